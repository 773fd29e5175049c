"use strict";

// Scores, growths and what training has spent.

const COUNTS = ["trainable_parameters", "steps", "optimizer_steps", "questions", "rollouts", "calls", "prompt_tokens", "sampled_tokens"];

function fillTable(table, heads, rows, otherwise) {
  if (!rows.length) {
    table.replaceChildren(element("caption", { className: "faint", text: otherwise }));
    return;
  }
  const head = element("tr", {}, ...heads.map((text) => element("th", { text, scope: "col" })));
  const body = rows.map((row) => element("tr", {}, ...row.map((text) => element("td", { text: typeof text === "number" ? text.toLocaleString("en") : text }))));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

function showTables(runs) {
  const scores = runs.flatMap((run) =>
    run.scores.map((score) => [
      run.label, score.set, score.when, percent(score.accuracy), `${percent(score.low)} to ${percent(score.high)}`, score.n,
      `${percent(score.floor)}${score.accuracy <= score.floor ? " (not above it)" : score.low <= score.floor ? " (interval reaches it)" : ""}`,
      percent(score.parse_rate), score.calls_per_answer.toFixed(1), score.tokens_per_answer.toFixed(1),
    ]),
  );
  const heads = ["run", "examples", "training", "accuracy", "95% interval", "n", "floor", "parsed", "calls an answer", "tokens an answer"];
  fillTable(byId("scoreTable"), heads, scores, "No run here has scores.");

  const growths = runs.flatMap((run) =>
    run.stages.slice(1).map((stage, number) => [run.label, stage.at_step, widthsText(run.stages[number].widths), widthsText(stage.widths)]),
  );
  fillTable(byId("growthTable"), ["run", "after step", "from", "to"], growths, "No run here has grown.");

  const spent = runs.flatMap((run) => {
    const row = (name, counts) => [run.label, name, ...COUNTS.map((count) => counts[count] ?? "")];
    const phases = run.ledger?.phases ?? [];
    return run.ledger ? [row("all", run.ledger), ...phases.map((phase, number) => row(`phase ${number + 1}`, phase))] : [];
  });
  fillTable(byId("budgetTable"), ["run", "part", ...COUNTS.map((name) => name.replaceAll("_", " "))], spent, "No run here has a checkpoint yet.");
}
