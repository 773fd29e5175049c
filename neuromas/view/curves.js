"use strict";

// Learning curves, drawn by uPlot.

const SMOOTHING_STEPS = 10;
const PLOT_HEIGHT = 300;
const WHOLE = Array.from({ length: 40 }, (_, number) => [1, 2, 5][number % 3] * 10 ** Math.floor(number / 3)); // no half steps
let plots = [];

function clearPlots() {
  for (const old of plots) old.destroy();
  plots = [];
}

// Tokens that a run which has grown from another one had sampled before its own first step: its ledger has them all.
function sampledBefore({ ledger, curves: { steps, series } }) {
  if (!ledger) return 0;
  return (series["sampled_tokens/sum"] ?? []).reduce((left, tokens, at) => left - (steps[at] <= ledger.steps ? tokens : 0), ledger.sampled_tokens);
}

function positions(run, axis = chosen.axis) {
  const { steps, series } = run.curves;
  if (axis === "steps") return steps;
  let sum = sampledBefore(run);
  return (series["sampled_tokens/sum"] ?? []).map((tokens) => (sum += tokens ?? 0));
}

function smooth(values) {
  return values.map((_, at) => {
    const part = values.slice(Math.max(0, at + 1 - SMOOTHING_STEPS), at + 1).filter((value) => value !== null);
    return part.length ? part.reduce((sum, value) => sum + value, 0) / part.length : null;
  });
}

// Where the runs have grown, on the chosen axis: before the first step that is done by the grown network.
function growthMarks(runs) {
  return runs.flatMap(({ run, stroke }) => {
    const at = positions(run);
    return run.stages.slice(1).flatMap((stage) => {
      const first = run.curves.steps.findIndex((step) => step > stage.at_step);
      if (first < 0) return [];
      const before = first ? at[first - 1] : chosen.axis === "steps" ? stage.at_step : sampledBefore(run);
      return [{ at: before, text: widthsText(stage.widths), stroke }];
    });
  });
}

function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.font = `${11 * devicePixelRatio}px sans-serif`;
  for (const [number, { at, text, stroke }] of marks.entries()) {
    const x = plot.valToPos(at, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = ctx.fillStyle = stroke;
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const isRight = x + ctx.measureText(text).width + 6 * devicePixelRatio > bbox.left + bbox.width;
    ctx.textAlign = isRight ? "right" : "left";
    ctx.fillText(text, x + (isRight ? -4 : 4) * devicePixelRatio, bbox.top + (12 + 13 * (number % 4)) * devicePixelRatio);
  }
  ctx.restore();
}

// `lines` are {run, label, values, stroke, ...} in the order in which they are drawn; `runs` those whose growths are marked.
function plot(where, lines, runs, { range, bands = [], axis: along = chosen.axis } = {}) {
  where.replaceChildren();
  const drawn = lines.filter(({ values }) => values.some((value) => value !== null));
  if (!drawn.length) {
    where.append(element("p", { className: "faint", text: "No step has logged this." }));
    return;
  }
  const marks = growthMarks(runs);
  const axis = { stroke: color("--faint"), grid: { stroke: color("--rule"), width: 1 }, ticks: { stroke: color("--rule"), width: 1 } };
  const compact = new Intl.NumberFormat("en", { notation: "compact" });
  const format = (value) => (value === null ? "" : Number(value.toPrecision(4)).toLocaleString("en"));
  const options = {
    width: Math.max(280, where.clientWidth),
    height: PLOT_HEIGHT,
    scales: { x: { time: false }, y: range ? { range: () => range } : {} },
    axes: [{ ...axis, incrs: WHOLE, values: (_, ticks) => ticks.map((tick) => compact.format(tick)) }, { ...axis, size: 58 }],
    series: [
      { label: along === "steps" ? "step" : "sampled tokens", value: (_, value) => format(value) },
      ...drawn.map(({ run, values, ...series }) => ({ spanGaps: true, points: { show: false }, value: (_, value) => format(value), ...series })),
    ],
    bands: drawn.length === lines.length ? bands : [],
    hooks: { draw: [(made) => drawMarks(made, marks)] },
  };
  const data = uPlot.join(drawn.map(({ run, values }) => [positions(run, along), values]));
  plots.push(new uPlot(options, data, where));
}

function learningLines(run, stroke, prefix, isAlone) {
  const { series } = run.curves;
  const reward = series["reward/mean"] ?? [];
  const of = (name) => series[`validation/${name}`] ?? [];
  const ends = isAlone ? [["low", "low/value"], ["high", "high/value"]] : [];
  return [
    { run, label: `${prefix}reward of the step`, values: reward, stroke: `${stroke}66`, width: 1 },
    { run, label: `${prefix}reward, mean of ${SMOOTHING_STEPS}`, values: smooth(reward), stroke, width: 2.5 },
    { run, label: `${prefix}validation accuracy`, values: of("accuracy/mean"), stroke: isAlone ? lineColor(1) : stroke, width: 1, dash: [6, 3], points: { show: true, size: 7 } },
    ...ends.map(([label, name]) => ({ run, label: `${label} end of its interval`, values: of(name), stroke: `${lineColor(1)}55`, width: 1 })),
  ];
}

function metricNames(runs) {
  return [...new Set(runs.flatMap((run) => Object.keys(run.curves.series)))];
}

const nodeFamily = (name) => name.replace(/\/node\/\d+\//, "/node/");

function showCurves(runs) {
  clearPlots();
  const names = metricNames(runs);
  const plain = names.filter((name) => !name.includes("/node/"));
  const families = [...new Set(names.filter((name) => name.includes("/node/")).map(nodeFamily))];
  if (!plain.includes(chosen.metric)) chosen.metric = plain.includes("answer_parsed/frac") ? "answer_parsed/frac" : plain[0] ?? "";
  if (!families.includes(chosen.nodeMetric)) chosen.nodeMetric = families[0] ?? "";
  if (!runs[chosen.nodeRun]) chosen.nodeRun = 0;
  fillSelect(byId("metric"), plain.map((name) => [name, name]), chosen.metric);
  fillSelect(byId("nodeMetric"), families.map((name) => [name, name]), chosen.nodeMetric);
  fillSelect(byId("nodeRun"), runs.map((run, number) => [number, run.label]), chosen.nodeRun);
  byId("axis").value = chosen.axis;

  const isAlone = runs.length === 1;
  const colored = runs.map((run, number) => ({ run, stroke: lineColor(number) }));
  const prefix = (run) => (isAlone ? "" : `${run.label}: `);
  const learning = colored.flatMap(({ run, stroke }) => learningLines(run, stroke, prefix(run), isAlone));
  plot(byId("learning"), learning, colored, { range: [0, 1], bands: isAlone ? [{ series: [5, 4], fill: `${lineColor(1)}22` }] : [] });
  const any = colored.map(({ run, stroke }) => ({ run, label: run.label, values: run.curves.series[chosen.metric] ?? [], stroke, width: 2 }));
  plot(byId("anyMetric"), any, colored);
  const run = runs[chosen.nodeRun];
  const ofNodes = Object.entries(run.curves.series).filter(([name]) => name.includes("/node/") && nodeFamily(name) === chosen.nodeMetric);
  const byNode = ofNodes.map(([name, values], number) => ({ run, label: `node ${name.match(/\/node\/(\d+)\//)[1]}`, values, stroke: lineColor(number), width: 2 }));
  plot(byId("byNode"), byNode, [{ run, stroke: color("--faint") }]);
}
