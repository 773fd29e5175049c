"use strict";

// The data of the page and what is chosen to be looked at.

const KEPT_CHUNKS = 16;
const chunks = new Map(); // number -> promise of its JSON, the least recently used one first

async function decode(number) {
  const packed = atob(document.getElementById(`chunk-${number}`).textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function readChunk(number) {
  const found = chunks.get(number) ?? decode(number);
  chunks.delete(number);
  chunks.set(number, found);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
  return found;
}

// A rollout as the index has it: where its texts are, and what the list and the filters need.
function rolloutOf([when, step, index, reward, malformed, chunk, place]) {
  return { when, step, index, reward, malformed: Boolean(malformed), chunk, place };
}

async function textsOf(rollout) {
  return (await readChunk(rollout.chunk))[rollout.place];
}

// What is chosen; the address holds it, so that a link leads to the same message.
const chosen = {
  tab: "messages", set: "", filter: "all", search: "", example: "", step: -1, // -1: all messages
  axis: "steps", metric: "", nodeMetric: "", nodeRun: 0, variety: "", theme: "",
};
const unchosen = { ...chosen };

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(chosen)) {
    const text = given.get(name) ?? String(unchosen[name]);
    const number = Number.parseInt(text, 10);
    chosen[name] = typeof unchosen[name] !== "number" ? text : Number.isNaN(number) ? unchosen[name] : number;
  }
}

function writeAddress() {
  const changed = Object.entries(chosen).filter(([name, value]) => value !== unchosen[name]);
  const hash = `#${new URLSearchParams(changed)}`;
  if (hash !== (location.hash || "#")) history.replaceState(null, "", hash);
}

const byId = (id) => document.getElementById(id);

// Texts go in as text, whatever they hold.
function element(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function fillSelect(select, options, value) {
  select.replaceChildren(...options.map(([name, text]) => element("option", { value: name, text })));
  select.value = value;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PALETTE_SIZE = 8;
const lineColor = (number) => color(`--line-${number % PALETTE_SIZE}`);
const widthsText = (widths) => `[${widths.join(", ")}]`;
