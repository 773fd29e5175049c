"use strict";

// Draws a network with what has flowed on each edge, laid out by dagre.

const NODE = { width: 74, height: 28 };
const ANSWER = { width: 150, height: 30 };
// The more edges lie side by side, the less room a message has; the transcript below has all of it.
const LABELS = [[1, { width: 260, height: 46 }], [4, { width: 120, height: 46 }], [Infinity, { width: 104, height: 32 }]];

function layOut(stage, answering, { node: size = NODE, ...ofEdge } = {}) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 16, edgesep: 8, marginx: 4, marginy: 4 });
  const layers = new Map(stage.layers);
  const side = Math.max(...stage.widths.map((width, number) => width * (stage.widths[number + 1] ?? 1)));
  const [, label] = LABELS.find(([most]) => side <= most);
  for (const node of layers.keys()) graph.setNode(String(node), { ...size });
  graph.setNode("answer", { ...ANSWER });
  for (const [sender, recipient] of stage.edges) {
    graph.setEdge(String(sender), String(recipient), { ...label, labelpos: "c", ...ofEdge, minlen: layers.get(recipient) - layers.get(sender) });
  }
  graph.setEdge(String(answering), "answer", { width: 0, height: 0 });
  dagre.layout(graph, { disableOptimalOrderHeuristic: true }); // nodes in the order of their ids
  return graph;
}

function svgElement(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function line(points, state) {
  const [first, ...rest] = points.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`);
  const last = points.at(-1);
  const group = svgElement("g", { class: `edge ${state}` });
  group.append(
    svgElement("path", { d: `M${first}L${rest.join("L")}` }),
    svgElement("path", { class: "tip", d: `M${last.x},${last.y}l-4,-8h8z` }),
  );
  return group;
}

function place(made, { x, y, width, height }) {
  made.style.left = `${x - width / 2}px`;
  made.style.top = `${y - height / 2}px`;
  made.style.width = `${width}px`;
  made.style.height = `${height}px`;
  return made;
}

function startDrawing(graph) {
  const { width, height } = graph.graph();
  const picture = svgElement("svg", { width, height, "aria-hidden": "true" });
  const drawing = element("div", { className: "network" });
  drawing.style.width = `${width}px`;
  drawing.style.height = `${height}px`;
  drawing.append(picture);
  return { drawing, picture };
}

// `stateOf(sender, recipient)` is "waiting", "sent" or "current", `pick` is called with the edge that is clicked.
function drawNetwork(stage, said, stateOf, answer, pick) {
  const graph = layOut(stage, said.answer.node);
  const { drawing, picture } = startDrawing(graph);
  const texts = new Map(said.messages.map(([sender, recipient, text, status]) => [`${sender}>${recipient}`, { text, status }]));
  for (const { v, w } of graph.edges()) {
    const edge = graph.edge({ v, w });
    if (w === "answer") {
      picture.append(line(edge.points, stateOf(0, 0)));
      continue;
    }
    const state = stateOf(Number(v), Number(w));
    const { text, status } = texts.get(`${v}>${w}`);
    picture.append(line(edge.points, state));
    const label = element("button", {
      className: `label ${state}${status === "ok" ? "" : " fault"}`,
      title: `node ${v} to node ${w}${status === "ok" ? "" : ` (${status})`}`,
      text: state === "waiting" ? "" : text,
      onclick: () => pick(Number(v), Number(w)),
    });
    drawing.append(place(label, edge));
  }
  for (const [node] of stage.layers) {
    drawing.append(place(element("div", { className: "node", text: `node ${node}` }), graph.node(String(node))));
  }
  const state = stateOf(0, 0);
  const end = element("button", {
    className: `answer ${state} ${state === "waiting" ? "" : answer.verdict}`,
    title: "the answer",
    text: state === "waiting" ? "answer" : answer.text,
    onclick: () => pick(0, 0),
  });
  drawing.append(place(end, graph.node("answer")));
  return drawing;
}
