"use strict";

// What interventions have done to a trained network: on its drawing, and in tables.

const WORTH = { node: { width: 96, height: 44 }, width: 92, height: 56 };
const VARIETY = {
  distinct_2: "distinct-2 of texts to one question (0.5: equal)",
  self_similarity: "self-similarity of texts to different questions (1: equal)",
  entropy: "entropy of words, bits",
  faults: "share of faults",
};
const points = (share) => `${share > 0.0005 ? "+" : share < -0.0005 ? "\u2212" : ""}${Math.abs(100 * share).toFixed(1)}`;
const interval = ({ low, high }) => `${points(low)} to ${points(high)}`;
const classOf = (effect) => ({ loss: "wrong", gain: "right" })[effect?.reading] ?? "faint";

function worstOf(effects) {
  return effects.filter(Boolean).sort((a, b) => Math.abs(b.change) - Math.abs(a.change))[0];
}

function worthLine(name, effect) {
  return element("span", { className: classOf(effect), text: effect ? `${name} ${points(effect.change)}` : "", title: effect ? `${effect.name}: ${interval(effect)}, ${effect.reading}` : "" });
}

// The network with the change of accuracy that each edge and node is worth: the thicker an edge, the more is lost without it.
function drawWorth({ network, effects, undisturbed }) {
  const senders = new Set(network.edges.map(([sender]) => sender));
  const answering = network.layers.map(([node]) => node).filter((node) => !senders.has(node)).at(-1);
  // Beside the line of a chain, whose width then shows; on it where lines cross.
  const labelpos = network.widths.every((width) => width === 1) ? "r" : "c";
  const graph = layOut(network, answering, { ...WORTH, labelpos });
  const { drawing, picture } = startDrawing(graph);
  const ofEdge = (kind, a, b) => effects.find((effect) => effect.kind === kind && effect.edges[0][0] === a && effect.edges[0][1] === b);
  const ofNode = (kind, node) => effects.find((effect) => effect.kind === kind && effect.nodes.length === 1 && effect.nodes[0] === node);
  for (const { v, w } of graph.edges()) {
    const edge = graph.edge({ v, w });
    if (w === "answer") {
      picture.append(line(edge.points, "sent"));
      continue;
    }
    const [drop, shuffle] = ["drop", "shuffle"].map((kind) => ofEdge(kind, Number(v), Number(w)));
    const worst = worstOf([drop, shuffle]);
    const made = line(edge.points, `worth ${classOf(worst)}`);
    made.firstChild.style.strokeWidth = 1.6 + 8 * Math.abs(classOf(worst) === "faint" ? 0 : worst.change);
    picture.append(made);
    const label = element("div", { className: `label worth ${labelpos}` }, worthLine("drop", drop), worthLine("shuffle", shuffle));
    drawing.append(place(label, edge));
  }
  for (const [node] of network.layers) {
    const box = element("div", { className: "node worth" }, element("span", { text: `node ${node}` }), worthLine("bare", ofNode("bare", node)));
    drawing.append(place(box, graph.node(String(node))));
  }
  drawing.append(place(element("div", { className: "answer", text: `right: ${percent(undisturbed.accuracy)}` }), graph.node("answer")));
  return element("div", { className: "wide" }, drawing);
}

function madeTable(heads, rows) {
  const table = element("table");
  fillTable(table, heads, rows, "");
  return element("div", { className: "wide" }, table);
}

function effectTable(effects) {
  const rows = effects.map((effect) => [effect.name, percent(effect.accuracy), points(effect.change), interval(effect), percent(effect.disturbed), percent(effect.answers_changed), effect.reading]);
  const made = madeTable(["intervention", "accuracy", "change", "95% interval", "disturbed", "answers changed", "reading"], rows);
  for (const [number, row] of made.querySelectorAll("tbody tr").entries()) row.lastChild.className = classOf(effects[number]);
  return made;
}

function nodeTable({ faults, specialisation, adapters }) {
  const told = Object.entries(specialisation).filter(([, found]) => found);
  const heads = ["node", "faults", ...told.map(([name]) => `told (${name})`), "norm of update"];
  const rows = Object.entries(faults).map(([node, share]) => [
    node, percent(share), ...told.map(([, found]) => (node in found.by_node ? percent(found.by_node[node]) : "-")),
    adapters.norms[node]?.toPrecision(3) ?? "-",
  ]);
  const notes = told.map(([name, found]) => element("p", { className: "faint", text: `told (${name}): a classifier of words gives ${percent(found.accuracy)} (${percent(found.low)} to ${percent(found.high)}) of the ${name} nodes' texts to the right node; chance is ${percent(found.chance)}.` }));
  return [madeTable(heads, rows), ...notes];
}

function showDiagnosis(index) {
  clearPlots();
  const shown = index.runs.filter((run) => run.diagnosis);
  if (!VARIETY[chosen.variety]) chosen.variety = "distinct_2";
  byId("diagnosed").replaceChildren(...shown.flatMap((run) => {
    const { diagnosis } = run;
    const { undisturbed, split, step, adapters } = diagnosis;
    const pairs = adapters.pairs.map(({ nodes, cosine, distance }) => [nodes.join(" and "), cosine?.toFixed(3) ?? "-", distance.toPrecision(3)]);
    const floor = undisturbed.low <= undisturbed.floor ? " The interval reaches the floor: there is nothing to lose, and effects are uninformative." : "";
    const text = `${split}, step ${step}: ${percent(undisturbed.accuracy)} undisturbed (n ${undisturbed.n}, 95% interval ${percent(undisturbed.low)} to ${percent(undisturbed.high)}, floor ${percent(undisturbed.floor)}).${floor}`;
    return [
      element("h2", { text: index.runs.length > 1 ? `${run.label}: what nodes and edges are worth` : "What nodes and edges are worth" }),
      element("p", { text }),
      drawWorth(diagnosis),
      element("p", { className: "faint", text: "Points of accuracy that change when an edge's message is dropped, or is that of another question (shuffle), and when a node writes without its adapter (bare). Red: a loss is shown; green: a gain; grey: neither. The thicker an edge, the larger the change." }),
      effectTable(diagnosis.effects),
      element("h2", { text: "Nodes" }),
      ...nodeTable(diagnosis),
      ...(pairs.length ? [element("h2", { text: "Adapters" }), madeTable(["adapters of", "cosine", "distance"], pairs)] : []),
    ];
  }));
  fillSelect(byId("variety"), Object.entries(VARIETY), chosen.variety);
  const lines = shown.flatMap((run) => Object.entries(run.diagnosis.training.nodes).map(([node, measured], number) => ({
    run: { curves: { steps: run.diagnosis.training.steps, series: {} }, stages: run.stages },
    label: `${index.runs.length > 1 ? `${run.label}, ` : ""}node ${node}`, values: measured[chosen.variety], stroke: lineColor(number), width: 2,
  })));
  plot(byId("varietyPlot"), lines, [], { axis: "steps" });
}
