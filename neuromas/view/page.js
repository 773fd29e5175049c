"use strict";

// Starts the page, and reads keys and clicks.

const QUIET_MILLISECONDS = 10_000;
const TABS = ["messages", "curves", "scores", "diagnosis"];

function showTab(index) {
  byId("diagnosisTab").hidden = !index.runs.some((run) => run.diagnosis);
  for (const tab of TABS) byId(tab).hidden = tab !== chosen.tab;
  for (const button of document.querySelectorAll("[data-tab]")) button.setAttribute("aria-selected", button.dataset.tab === chosen.tab);
  if (chosen.tab === "curves") showCurves(index.runs);
  if (chosen.tab === "scores") showTables(index.runs);
  if (chosen.tab === "diagnosis") showDiagnosis(index);
}

async function show(index) {
  if (byId("search").value !== chosen.search) byId("search").value = chosen.search;
  if (!TABS.includes(chosen.tab) || (chosen.tab === "diagnosis" && !index.runs.some((run) => run.diagnosis))) chosen.tab = TABS[0];
  document.documentElement.dataset.theme = chosen.theme;
  showRuns(index.runs);
  showTab(index);
  await showMessages(index);
  writeAddress();
}

function showRuns(runs) {
  const rows = runs.map((run, number) => {
    const shapes = run.stages.map((stage) => widthsText(stage.widths)).join(" \u2192 ");
    const scores = run.scores.filter((score) => score.when === "after").map((score) => {
      const before = run.scores.find((other) => other.when === "before" && other.set === score.set);
      return `${score.set} ${before ? `${percent(before.accuracy)} \u2192 ` : ""}${percent(score.accuracy)} (floor ${percent(score.floor)}, n ${score.n})`;
    });
    const mark = element("span", { className: "mark" });
    mark.style.background = lineColor(number);
    const text = [shapes, `seed ${run.seed}`, run.backbone, `${run.curves.steps.length} steps`, ...scores].join(" \u00b7 ");
    return element("li", {}, mark, element("b", { text: run.label }), ` ${text}`);
  });
  byId("title").textContent = runs[0].task;
  byId("runs").replaceChildren(...rows);
}

function isDark() {
  return chosen.theme ? chosen.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function choose(index, changes) {
  Object.assign(chosen, changes);
  return show(index);
}

function listen(index) {
  const on = (id, event, change) => byId(id).addEventListener(event, () => choose(index, change(byId(id).value)));
  for (const button of document.querySelectorAll("[data-tab]")) button.onclick = () => choose(index, { tab: button.dataset.tab });
  on("theme", "click", () => ({ theme: isDark() ? "light" : "dark" }));
  on("axis", "change", (axis) => ({ axis }));
  on("metric", "change", (metric) => ({ metric }));
  on("nodeMetric", "change", (nodeMetric) => ({ nodeMetric }));
  on("variety", "change", (variety) => ({ variety }));
  on("nodeRun", "change", (run) => ({ nodeRun: Number(run) }));
  on("set", "change", (set) => ({ set, filter: "all", example: "", step: -1 }));
  on("search", "input", (search) => ({ search }));
  for (const [id, act] of Object.entries(MOVES)) byId(id).onclick = () => choose(index, act());
  byId("help").onclick = () => byId("keys").showModal();
  byId("closeKeys").onclick = () => byId("keys").close();
  byId("list").addEventListener("scroll", () => showRows(index));
  document.addEventListener("keydown", (event) => readKey(index, event));
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => show(index), 150);
  });
  addEventListener("hashchange", () => { readAddress(); show(index); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(index));
}

const KEYS = {
  j: () => MOVES.next(), k: () => MOVES.previous(), ArrowRight: () => MOVES.forward(), ArrowLeft: () => MOVES.back(),
  Home: () => MOVES.first(), End: () => MOVES.last(),
  a: () => ({ filter: "all" }), w: () => ({ filter: "wrong" }), r: () => ({ filter: "right" }), m: () => ({ filter: "malformed" }),
  1: () => ({ tab: TABS[0] }), 2: () => ({ tab: TABS[1] }), 3: () => ({ tab: TABS[2] }), 4: () => ({ tab: TABS[3] }),
  t: () => ({ theme: isDark() ? "light" : "dark" }),
};

function readKey(index, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select") || byId("keys").open) return;
  if (event.key === "?") byId("keys").showModal();
  else if (event.key === "/") byId("search").focus();
  else if (KEYS[event.key]) choose(index, KEYS[event.key]());
  else return;
  event.preventDefault();
}

// The command rewrites the file while the run trains; whoever is reading is left alone.
function keepFresh() {
  let touched = 0;
  for (const event of ["keydown", "pointerdown", "wheel", "touchmove"]) addEventListener(event, () => (touched = performance.now()), { passive: true });
  setInterval(() => { if (performance.now() - touched > QUIET_MILLISECONDS) location.reload(); }, QUIET_MILLISECONDS);
}

async function start() {
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old for the page: it cannot unpack gzip (DecompressionStream)");
  const index = await readChunk(0);
  index.examples.forEach((example) => { example.runs = example.runs.map((rollouts) => rollouts.map(rolloutOf)); });
  readAddress();
  listen(index);
  await show(index);
  document.documentElement.dataset.ready = "yes";
  if ("watched" in document.documentElement.dataset) keepFresh();
}

start().catch((error) => {
  byId("failure").textContent = `The page cannot be shown: ${error.message}`;
  byId("failure").hidden = false;
  throw error;
});
