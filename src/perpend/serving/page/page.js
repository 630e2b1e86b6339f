"use strict";
// Text of the model and of the user goes to the page as text nodes only. Nothing is fetched but from this server.
const $ = (id) => document.getElementById(id);
const SIDES = ["base", "edited"];
const WAIT = 300; // milliseconds after which a scale that was moved is taken for meant
let about = null, key = "", running = null, later = 0, turns = [];

const scale = () => Number($("scale").value);
const shown = (x) => (Number.isInteger(x) ? String(x) : x.toFixed(2)).replace("-", "−");
const sides = () => (about && about.edit ? SIDES : ["base"]);

function ask(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers, credentials: "omit" });
}

async function refusal(response) {
  if (response.status === 401) $("lock").hidden = false;
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

function messages(side, upTo) {
  const system = $("system").value.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, turns.indexOf(upTo) + 1)) {
    if (turn !== upTo && !turn[side]) continue;
    found.push({ role: "user", content: turn.user });
    if (turn !== upTo) found.push({ role: "assistant", content: turn[side].text.data });
  }
  return found;
}

function card(turn, side) {
  const node = $("answer").content.firstElementChild.cloneNode(true);
  const text = document.createTextNode("");
  const heading = node.querySelector("h3");
  heading.textContent = side === "base" ? "base" : `edited × ${shown(turn.scale)}`;
  heading.id = `answer-${turns.indexOf(turn)}-${side}`;
  node.setAttribute("aria-labelledby", heading.id);
  node.setAttribute("aria-busy", "true");
  node.classList.add(side);
  node.querySelector(".text").append(text);
  if (turn[side]) turn[side].node.replaceWith(node);
  else turn.node.querySelector(".sides").append(node);
  turn[side] = { node, text, label: "", ended: false };
}

function follow(work) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - innerHeight < 120;
  work();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function take(turn, event) {
  if (event.error) throw new Error(event.error.message);
  const answer = turn[event.side];
  if (event.text) follow(() => answer.text.appendData(event.text));
  if (event.finish) {
    answer.ended = true;
    answer.node.setAttribute("aria-busy", "false");
    if (event.finish === "length") answer.node.querySelector(".note").textContent = `cut after ${event.tokens} tokens`;
  }
  if (event.label) label(answer, event.label);
}

function label(answer, found) {
  const chip = answer.node.querySelector(".chip"), note = answer.node.querySelector(".note");
  answer.label = chip.textContent = found.label;
  chip.classList.add(found.label);
  const said = ["dictionary", "classifier"].filter((judge) => found[judge]).map((judge) => `${judge}: ${[found[judge].label, found[judge].reason].filter(Boolean).join(", ")}`);
  follow(() => { note.textContent = [note.textContent, ...said].filter(Boolean).join(" · "); });
}

async function answer(turn, who) {
  if (running) running.abort();
  const mine = running = new AbortController();
  turn.scale = scale();
  for (const side of who) card(turn, side);
  busy(true);
  $("alert").textContent = "";
  $("status").textContent = `${who.join(" and ")} answering`;
  const drawn = { temperature: Number($("temperature").value), max_tokens: Number($("length").value) || undefined };
  const body = { ...drawn, scale: turn.scale, ...Object.fromEntries(who.map((side) => [side, messages(side, turn)])) };
  try {
    const response = await ask("compare", { method: "POST", body: JSON.stringify(body), signal: mine.signal });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) take(turn, event);
    $("status").textContent = who.map((side) => `${side}: ${turn[side].label}`).join(", ");
  } catch (error) {
    if (mine.signal.aborted) $("status").textContent = "broken off";
    else $("alert").textContent = error.message;
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
      for (const side of who) settle(turn[side], mine.signal.aborted);
    }
  }
}

function settle(one, stopped) {
  one.node.setAttribute("aria-busy", "false");
  if (!one.ended) one.node.querySelector(".note").textContent = stopped ? "broken off" : "failed";
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
}

function begin(words) {
  const node = $("turn").content.firstElementChild.cloneNode(true);
  node.querySelector(".said").textContent = words;
  const turn = { user: words, node, scale: scale(), base: null, edited: null };
  turns.push(turn);
  $("start").hidden = true;
  $("reset").hidden = false;
  $("talk").append(node);
  answer(turn, sides());
  if (turns.length > 1) node.scrollIntoView();
}

function again() {
  const turn = turns.at(-1);
  if (!turn || !turn.edited || turn.scale === scale()) return;
  answer(turn, turn.base.ended ? ["edited"] : SIDES);
}

async function open() {
  const response = await ask("about");
  if (!response.ok) { if (response.status !== 401 || key) $("alert").textContent = await refusal(response); else await refusal(response); return; }
  about = await response.json();
  $("lock").hidden = true;
  $("alert").textContent = "";
  $("length").value = about.max_tokens;
  $("dial").hidden = !about.edit;
  $("words").placeholder = about.edit ? "Ask both" : "Ask";
  const edit = about.edit ? `edit ${about.edit.slice(0, 12)}` : "no edit: start with --edit to compare";
  $("about").textContent = `${about.model} · ${edit} · labels by ${about.judges === "hybrid" ? "dictionary and classifier" : "dictionary only"}`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("words").value.trim();
  if (!words || running || !about) return;
  $("words").value = "";
  begin(words);
});
$("words").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("scale").addEventListener("input", () => {
  const text = shown(scale());
  $("scale-shown").textContent = text;
  $("scale").setAttribute("aria-valuetext", `${text} times the edit`);
  clearTimeout(later);
  later = setTimeout(again, WAIT);
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", () => {
  if (running) running.abort();
  for (const turn of turns) turn.node.remove();
  turns = [];
  $("start").hidden = false;
  $("reset").hidden = true;
  $("words").focus();
});
$("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  open();
});
for (const idea of document.querySelectorAll(".idea")) {
  idea.addEventListener("click", () => { if (about && !running) begin(idea.textContent); });
}
open();
