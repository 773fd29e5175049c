"use strict";

// The list of examples, and one example: its rollouts side by side, message by message.

const ROW_HEIGHT = 46;
const SET_OF_TRAINING = "train";
const isRight = (rollout) => rollout.reward === 1;

// What a filter asks of an example: of its rollouts after training (before, where there are no others), or of all in training.
const FILTERS = {
  all: ["All", () => true],
  wrong: ["Wrong", (example) => judged(example).some((rollout) => !isRight(rollout))],
  right: ["Right", (example) => judged(example).some(isRight)],
  malformed: ["Malformed", (example) => judged(example).some((rollout) => rollout.malformed)],
  learned: ["Learned", (example) => changed(example, false, true)],
  lost: ["Lost", (example) => changed(example, true, false)],
  differ: ["Runs differ", (example) => new Set(example.runs.map((rollouts) => rollouts.at(-1)).filter(Boolean).map(isRight)).size > 1],
};

function judged(example) {
  return example.runs.flatMap((rollouts) => {
    if (example.set === SET_OF_TRAINING) return rollouts;
    const after = rollouts.filter((rollout) => rollout.when === "after");
    return after.length ? after : rollouts;
  });
}

function changed(example, before, after) {
  return example.runs.some((rollouts) => {
    const of = (when) => rollouts.find((rollout) => rollout.when === when);
    return of("before") && of("after") && isRight(of("before")) === before && isRight(of("after")) === after;
  });
}

let shown = []; // the examples that pass
let opening = ""; // what all questions of the set begin with
let current = null; // what the steps go through: {example, columns, steps}

function narrow(index) {
  const sets = [...new Set(index.examples.map((example) => example.set))];
  if (!sets.includes(chosen.set)) chosen.set = sets[0];
  const ofSet = index.examples.filter((example) => example.set === chosen.set);
  const isTraining = chosen.set === SET_OF_TRAINING;
  const names = Object.keys(FILTERS).filter((name) => {
    if (name === "differ") return index.runs.length > 1 && !isTraining;
    return !(isTraining && ["learned", "lost"].includes(name));
  });
  if (!names.includes(chosen.filter)) chosen.filter = "all";
  fillSelect(byId("set"), sets.map((name) => [name, `${name} (${index.examples.filter((example) => example.set === name).length})`]), chosen.set);
  const words = chosen.search.toLowerCase();
  const found = ofSet.filter((example) => example.question.toLowerCase().includes(words));
  byId("filters").replaceChildren(...names.map((name) => {
    const [text, passes] = FILTERS[name];
    const button = element("button", { text: `${text} ${found.filter(passes).length}`, onclick: () => choose(index, { filter: name }) });
    button.dataset.filter = name;
    button.setAttribute("aria-pressed", name === chosen.filter);
    return button;
  }));
  shown = found.filter(FILTERS[chosen.filter][1]);
  opening = commonOpening(ofSet.map((example) => example.question));
  if (shown.some((example) => example.id === chosen.example)) return;
  if (chosen.example) chosen.step = -1;
  chosen.example = shown[0]?.id ?? "";
}

function commonOpening(questions) {
  const first = questions[0];
  let end = questions.length > 1 ? first.length : 0;
  for (const question of questions) {
    while (!question.startsWith(first.slice(0, end))) end -= 1;
  }
  return first.slice(0, first.lastIndexOf(" ", end) + 1);
}

function verdict(rollout) {
  const mark = isRight(rollout) ? "\u2713" : rollout.reward > 0 ? rollout.reward.toFixed(2) : "\u2717";
  return element("span", { className: isRight(rollout) ? "right" : "wrong", text: mark + (rollout.malformed ? "!" : "") });
}

function marks(example) {
  return example.runs.map((rollouts) => {
    const made = element("span", { className: "marks" });
    if (example.set === SET_OF_TRAINING) made.append(rollouts.length ? `${rollouts.filter(isRight).length}/${rollouts.length}` : "-");
    else made.append(...rollouts.flatMap((rollout, number) => (number ? ["\u2192", verdict(rollout)] : [verdict(rollout)])));
    return made;
  });
}

// Only the rows in sight exist: a run has thousands of examples.
function showRows(index) {
  const list = byId("list");
  byId("rows").style.height = `${shown.length * ROW_HEIGHT}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 5);
  const last = Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + 5;
  const rows = shown.slice(first, last).map((example, number) => {
    const rest = example.question.slice(opening.length);
    const row = element("div", { className: "example", role: "option", onclick: () => choose(index, { example: example.id, step: -1 }) },
      ...marks(example), element("span", { className: "snippet", text: (opening ? "\u2026 " : "") + rest.slice(0, 160) }));
    row.setAttribute("aria-selected", example.id === chosen.example);
    row.style.top = `${(first + number) * ROW_HEIGHT}px`;
    return row;
  });
  byId("rows").replaceChildren(...rows);
}

function revealRow() {
  const list = byId("list");
  const top = shown.findIndex((example) => example.id === chosen.example) * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}

function named(rollout) {
  const mark = isRight(rollout) ? "right" : rollout.reward > 0 ? `reward ${rollout.reward.toFixed(2)}` : "wrong";
  const when = rollout.when === "train" ? `step ${rollout.step + 1}, rollout ${rollout.index + 1}` : `${rollout.when} training`;
  return `${when}: ${mark}${rollout.malformed ? ", malformed" : ""}`;
}

// Which rollouts of each run stand side by side: before and after, or in training one that is right and one that is not.
function standing(rollouts) {
  if (rollouts.length < 2) return rollouts.map((_, number) => number);
  if (rollouts[0].when !== "train") return [0, rollouts.length - 1];
  const right = rollouts.findIndex(isRight);
  const wrong = rollouts.findIndex((rollout) => !isRight(rollout));
  return right < 0 || wrong < 0 ? [0, 1] : [right, wrong];
}

// Reads what columns of {run, pick} show. Nothing is taken back half read: meanwhile another example may have been chosen.
async function readColumns(index, example, picked) {
  const columns = await Promise.all(picked.map(async ({ run, pick }) => {
    const rollout = example.runs[run][pick];
    const said = await textsOf(rollout);
    return { run, pick, rollout, said, stage: index.runs[run].stages[said.stage] };
  }));
  return { example, columns, steps: stepsOf(columns) };
}

// All edges of the networks shown, in the order in which messages flow, and the answer last, as [0, 0].
function stepsOf(columns) {
  const layers = new Map();
  for (const { stage } of columns) {
    for (const [node, layer] of stage.layers) layers.set(node, Math.max(layer, layers.get(node) ?? 0));
  }
  const edges = new Map(columns.flatMap(({ said }) => said.messages.map(([a, b]) => [`${a}>${b}`, [a, b]])));
  const sorted = [...edges.values()].sort(([a, b], [c, d]) => layers.get(a) - layers.get(c) || a - c || b - d);
  return [...sorted, [0, 0]];
}

async function showMessages(index) {
  narrow(index);
  if (chosen.tab !== "messages") return;
  showRows(index);
  revealRow();
  showRows(index);
  const example = shown.find(({ id }) => id === chosen.example);
  byId("example").hidden = !example;
  if (!example) return;
  if (current?.example !== example) {
    const picked = example.runs.flatMap((rollouts, run) => standing(rollouts).map((pick) => ({ run, pick })));
    const read = await readColumns(index, example, picked);
    if (chosen.example !== example.id || chosen.set !== example.set) return;
    current = read;
  }
  showExample(index);
}

function showExample(index) {
  const { example, steps } = current;
  if (chosen.step < -1 || chosen.step >= steps.length) chosen.step = -1;
  const done = chosen.step < 0 ? steps.length : chosen.step;
  byId("place").textContent = `${shown.indexOf(example) + 1} of ${shown.length}`;
  byId("question").textContent = example.question;
  byId("gold").textContent = example.gold;
  byId("step").textContent = done ? `${done} of ${steps.length}: ${stepName(steps[done - 1])}` : `0 of ${steps.length}`;
  showNetworks(index, done);
  showTranscript(index, done);
}

const stepName = ([sender, recipient]) => (sender ? `node ${sender} \u2192 node ${recipient}` : "answer");

function stateAt(steps, done) {
  return (sender, recipient) => {
    const at = steps.findIndex(([a, b]) => a === sender && b === recipient);
    return at >= done ? "waiting" : at === done - 1 ? "current" : "sent";
  };
}

function answerOf({ rollout, said }) {
  const { read } = said.answer;
  const text = read === null ? "no answer that can be read" : read;
  const [className, mark] = isRight(rollout) ? ["right", "\u2713"] : ["wrong", rollout.reward > 0 ? rollout.reward.toFixed(2) : "\u2717"];
  return { verdict: className, text: `${mark} ${text}` };
}

function columnHead(index, column) {
  const { run, pick } = column;
  const rollouts = current.example.runs[run];
  const select = element("select", { title: "Which rollout is shown" });
  select.setAttribute("aria-label", `Rollout of ${index.runs[run].label}`);
  fillSelect(select, rollouts.map((rollout, number) => [number, named(rollout)]), pick);
  select.onchange = async () => {
    const { example, columns } = current;
    const picked = columns.map((other) => (other === column ? { run, pick: Number(select.value) } : other));
    const read = await readColumns(index, example, picked);
    if (current.example !== example) return;
    current = read;
    choose(index, { step: -1 });
  };
  const mark = element("span", { className: "mark" });
  mark.style.background = lineColor(run);
  return element("div", { className: "head" }, element("b", {}, mark, index.runs.length > 1 ? index.runs[run].label : ""), select);
}

function showNetworks(index, done) {
  const { columns, steps } = current;
  const pick = (sender, recipient) => choose(index, { step: steps.findIndex(([a, b]) => a === sender && b === recipient) + 1 });
  byId("networks").replaceChildren(...columns.map((column) => {
    const drawing = drawNetwork(column.stage, column.said, stateAt(steps, done), answerOf(column), pick);
    return element("figure", {}, columnHead(index, column), element("div", { className: "wide" }, drawing));
  }));
}

function cell(column, [sender, recipient]) {
  const { said, rollout } = column;
  if (!sender) {
    const { verdict: className, text } = answerOf(column);
    const senders = new Set(said.messages.map(([from]) => from));
    // Where several nodes answer, those whose text was not taken.
    const others = Object.entries(said.written).filter(([node]) => !senders.has(Number(node)));
    return [
      element("p", { className: "text", text: said.answer.text.trim() || "(nothing)" }), element("p", { className, text }),
      ...others.map(([node, other]) => element("p", { className: "text faint", text: `node ${node} answered: ${other}` })),
    ];
  }
  const found = said.messages.find(([a, b]) => a === sender && b === recipient);
  if (!found) return [element("p", { className: "faint", text: "This network has no such edge." })];
  const [, , text, status] = found;
  const made = [element("p", { className: "text", text })];
  if (status !== "ok") made.push(element("p", { className: "fault", text: `malformed: ${STATUS[status] ?? status}` }));
  if (said.written[sender] !== undefined) {
    const all = element("p", { className: "text", text: said.written[sender] });
    made.push(element("details", {}, element("summary", { text: `all that node ${sender} wrote` }), all));
  }
  return made;
}

const STATUS = {
  missing: "the sender addressed others, not this node",
  unaddressed: "the sender addressed no node, so the whole text is delivered",
  empty: "there is no text for this node",
};

function showTranscript(index, done) {
  const { columns, steps } = current;
  const rows = steps.map((step, number) => {
    const heading = element("button", { className: "step", text: stepName(step), onclick: () => choose(index, { step: number + 1 }) });
    const cells = columns.map((column) => {
      const title = columns.length > 1 ? [element("p", { className: "of", text: named(column.rollout) + (index.runs.length > 1 ? `, ${index.runs[column.run].label}` : "") })] : [];
      const made = element("div", { className: "cell" }, ...title, ...cell(column, step));
      made.style.borderColor = lineColor(column.run);
      return made;
    });
    const state = number >= done ? "waiting" : number === done - 1 ? "current" : "sent";
    return element("li", { className: state }, heading, element("div", { className: "cells" }, ...cells));
  });
  byId("transcript").replaceChildren(...rows);
}

// What buttons and keys change.
const MOVES = {
  next: () => moveExample(1),
  previous: () => moveExample(-1),
  first: () => ({ step: 0 }),
  last: () => ({ step: -1 }),
  forward: () => moveStep(1),
  back: () => moveStep(-1),
};

function moveExample(by) {
  const at = shown.findIndex((example) => example.id === chosen.example) + by;
  return shown[at] ? { example: shown[at].id, step: -1 } : {};
}

function moveStep(by) {
  const all = current?.steps.length ?? 0;
  const at = (chosen.step < 0 ? all : chosen.step) + by;
  return { step: at >= all ? -1 : Math.max(0, at) };
}
