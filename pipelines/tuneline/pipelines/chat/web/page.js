"use strict";

// Text of people and models is only ever set as textContent, so that it cannot become HTML.

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty"];
const byId = (id) => document.getElementById(id);
const log = byId("log"), form = byId("form"), text = byId("text"), send = byId("send");
const scroller = document.querySelector("main");

let session;
let histories = {}; // messages without the system message, by the name of the voice
let system = null; // the system message that conversations begin with
let running = null; // the AbortController of the answers in the making

function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

function startOver() {
  if (running) running.abort();
  histories = Object.fromEntries(session.voices.map((voice) => [voice.name, []]));
  log.replaceChildren();
  byId("status").textContent = session.has_template
    ? "" : "This model has no chat template: it continues your text.";
}

function sampling() {
  const values = Object.fromEntries(NUMBERS.map((name) => [name, Number(byId(name).value)]));
  if (values.temperature === 0) { values.temperature = 1; values.top_k = 1; }
  return values;
}

function showSampling(values) {
  for (const name of NUMBERS) byId(name).value = values[name];
  nameSampling();
}

function nameSampling() {
  const now = sampling();
  const same = (other) => NUMBERS.every((name) => other[name] === now[name]);
  const names = Object.entries(session.presets).filter(([, values]) => same(values));
  const name = same(session.published) ? "as published" : names.length ? names[0][0] : "custom";
  byId("preset").value = name;
  byId("summary").textContent = byId("preset").selectedOptions[0].textContent;
}

function setRunning(controller) {
  running = controller;
  send.textContent = controller ? "Stop" : "Send";
  log.setAttribute("aria-busy", String(Boolean(controller)));
}

function isAtEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

function keepAtEnd(change) {
  const follows = isAtEnd();
  change();
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function ask(voice, box, history, signal) {
  const said = element("p");
  box.append(said);
  box.setAttribute("aria-busy", "true");
  const messages = [
    ...(system === null ? [] : [{ role: "system", content: system }]), ...history];
  const seed = byId("seed").value;
  let remark = "", isError = false;
  try {
    const response = await fetch("answer", {
      method: "POST", signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        voice: voice.name, messages, sampling: sampling(),
        max_tokens: Number(byId("max_tokens").value), seed: seed === "" ? null : Number(seed),
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error);
    for await (const line of linesOf(response.body)) {
      if (line.error) throw new Error(line.error);
      if (line.text) keepAtEnd(() => { said.textContent += line.text; });
      if (line.is_cut) remark = "Cut at the largest number of tokens per answer.";
    }
  } catch (error) {
    if (error.name === "AbortError") remark = "Stopped.";
    else {
      isError = true;
      remark = error instanceof TypeError
        ? "The server does not answer: it may have been stopped." : error.message;
    }
  }
  box.removeAttribute("aria-busy");
  if (!said.textContent && !remark) remark = "(an empty answer)";
  if (remark) {
    keepAtEnd(() => box.append(element("p", isError ? "remark error" : "remark", remark)));
  }
  // A message without an answer would be followed by the next message.
  if (said.textContent) history.push({ role: "assistant", content: said.textContent });
  else history.pop();
}

async function submit() {
  const content = text.value.trim();
  if (!content) return;
  if (!form.checkValidity()) {
    byId("settings").open = true; // a browser cannot point at a field that is hidden
    form.reportValidity();
    return;
  }
  text.value = "";
  fit();
  const controller = new AbortController();
  setRunning(controller);
  const answers = element("div", session.voices.length > 1 ? "answers two" : "answers");
  const asking = element("div", "user");
  asking.append(element("h2", "hidden", "you"), element("p", "", content));
  log.append(asking, answers);
  const asked = session.voices.map((voice) => {
    const history = histories[voice.name];
    history.push({ role: "user", content });
    const box = element("article", "answer");
    box.append(element("h2", "", voice.name));
    answers.append(box);
    return ask(voice, box, history, controller.signal);
  });
  scroller.scrollTop = scroller.scrollHeight;
  await Promise.all(asked);
  if (running === controller) setRunning(null);
  text.focus();
}

function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else submit();
});
text.addEventListener("input", fit);
window.addEventListener("resize", fit);
text.addEventListener("keydown", (event) => {
  // While an input method composes a syllable, Enter ends the syllable; Safari then says 229.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running) submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
byId("reset").addEventListener("click", () => { startOver(); setRunning(null); text.focus(); });
byId("system").addEventListener("change", (event) => {
  system = event.target.value || null;
  startOver();
  setRunning(null);
});
byId("preset").addEventListener("change", (event) => {
  const name = event.target.value;
  const values = name === "as published" ? session.published : session.presets[name];
  if (values) showSampling(values);
});
for (const name of NUMBERS) byId(name).addEventListener("input", nameSampling);

async function start() {
  session = await (await fetch("session")).json();
  document.title = `${session.name} - tuneline chat`;
  byId("name").textContent = session.name;
  byId("voices").textContent = session.voices
    .map((voice) => `${voice.name}: ${voice.title}, ${voice.where}`).join(" | ");
  for (const name of ["as published", ...Object.keys(session.presets), "custom"]) {
    const option = element("option", "", name);
    option.value = name;
    byId("preset").append(option);
  }
  system = session.system;
  byId("system").value = system ?? "";
  byId("max_tokens").value = session.max_tokens;
  byId("seed").value = session.seed ?? "";
  showSampling(session.sampling);
  startOver();
}

start();
