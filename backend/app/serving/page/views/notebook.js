// 正文：改它，或者一个个词元地读它，颜色说模型觉得每一个有多意外。

import { byId, el, percent, pictured, rove, say, settle, visible } from "../dom.js";
import { amend, branch, focusOn, get, on, separator, set } from "../store.js";
import { go, stepBack, stepForward, stop, textNow } from "../write.js";

/** @typedef {import("../store.js").Token} Token */
/** @typedef {import("../store.js").State} State */

// 五级的界：概率，名次（GLTR, arXiv:1906.04043 的 10/100/1000），熵（nat）。
const PROBABILITY = [0.5, 0.1, 0.01, 0.001];
const RANK = [1, 10, 100, 1000];
const ENTROPY = [0.5, 1.5, 3, 5];

/** @param {Token} token @param {State["colour"]} by @returns {number | null} 0 到 4 */
export function level(token, by) {
  if (by === "none" || token.logprob === null) return null;
  if (by === "probability") {
    const p = Math.exp(token.logprob);
    return PROBABILITY.filter((edge) => p < edge).length;
  }
  if (by === "rank") return RANK.filter((edge) => (token.rank ?? 0) >= edge).length;
  return ENTROPY.filter((edge) => (token.entropy ?? 0) >= edge).length;
}

/** 这个词元的数，用话说；颜色从不单独说什么。 @param {Token} token @param {number} at */
export function told(token, at) {
  const name = visible(token.text);
  if (token.logprob === null) return say("token.unscored", { name, at: at + 1 });
  return say("token.told", {
    name, at: at + 1, p: percent(Math.exp(token.logprob)), rank: (token.rank ?? 0) + 1,
    h: (token.entropy ?? 0).toFixed(2),
  });
}

/** @param {(at: number) => void} choose 在一个词元上按了 Enter */
export function notebook(choose) {
  const root = byId("notebook");
  const area = el("textarea", {
    id: "draft", label: "text.label", hint: "text.hint", spellcheck: "false", rows: "9",
    oninput: () => amend({ draft: area.value }),
  });
  const paper = el("div", { id: "tokens", role: "listbox", label: "tokens.label", class: "paper", tabindex: "-1" });
  const reading = el("p", { id: "reading", class: "reading" });
  const count = el("input", {
    id: "count", type: "number", min: "1", max: "1024", label: "count.label",
    oninput: () => {
      const max_tokens = Math.max(1, Math.min(1024, Math.round(count.valueAsNumber) || 32));
      set({ sampling: { ...get().sampling, max_tokens } });
    },
    onblur: () => { count.value = String(get().sampling.max_tokens); },
  });
  const button = (/** @type {string} */ id, /** @type {() => void} */ act) =>
    el("button", { id, type: "button", say: id, title: `${id}.key`, onclick: act });
  const buttons = {
    go: button("continue", () => void go(get().sampling.max_tokens)),
    stop: button("stop", () => void stop()),
    undo: button("undo", () => void stepBack()),
    redo: button("redo", () => void stepForward()),
  };
  buttons.go.classList.add("primary");
  const modes = el("div", { class: "modes", role: "group", label: "mode" },
    el("button", { id: "edit", type: "button", say: "mode.edit", onclick: () => edit() }),
    el("button", { id: "read", type: "button", say: "mode.read", onclick: () => void go(0) }));
  const room = el("p", { id: "room", class: "fine" });
  root.append(
    el("div", { class: "row" },
      el("h2", { say: "notebook.title" }), modes, colours()),
    el("p", { class: "what", say: "notebook.what" }),
    area, paper, reading,
    el("div", { class: "row actions" }, buttons.go,
      el("label", { class: "count" }, count, el("span", { say: "count" })),
      buttons.stop, buttons.undo, buttons.redo),
    room,
    el("details", { class: "how" }, el("summary", { say: "how" }),
      el("p", { say: "notebook.how" }),
      el("p", { class: "source" }, el("span", { say: "source" }), " ",
        el("code", { text: "backend/app/serving/draws.py" }), " ",
        el("code", { text: "backend/app/generation/sampling.py" }))),
  );

  rove(paper, ".tok", () => 0, (item) => {
    const at = Number(item.dataset.at);
    const token = branch().tokens[at];
    if (token) item.setAttribute("aria-label", told(token, at));
    focusOn(at);
  });
  paper.addEventListener("click", (event) => {
    const item = /** @type {HTMLElement} */ (event.target).closest(".tok");
    if (item instanceof HTMLElement) item.focus();
  });
  paper.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) choose(get().focus);
  });

  on(["book", "colour", "tint", "focus", "lang"], (state) => draw(state, paper));
  on(["book"], (state) => {
    const { draft } = branch(state);
    const typing = document.activeElement === area;
    area.hidden = draft === null;
    paper.hidden = draft !== null;
    // 输入框不见了，焦点不该跟着不见。
    if (typing && draft === null) paper.focus();
    if (draft !== null && area.value !== draft) area.value = draft;
  });
  on(["focus", "book", "lang"], (state) => {
    const token = branch(state).draft === null ? branch(state).tokens[state.focus] : undefined;
    reading.textContent = token ? told(token, state.focus) : say("reading.none");
  });
  on(["book", "models", "model", "lang"], (state) => {
    const { tokens, draft } = branch(state);
    const context = state.models[state.model]?.context ?? 0;
    const known = { n: tokens.length, context };
    room.textContent = draft === null && context ? say("room", known) : say("room.editing", known);
  });
  on(["book", "writing", "past", "future", "models", "sampling", "lang"], (state) => {
    const editing = branch(state).draft !== null;
    root.setAttribute("aria-busy", String(state.writing));
    buttons.go.disabled = state.writing || !state.model;
    buttons.stop.disabled = !state.writing;
    area.readOnly = state.writing;
    buttons.undo.disabled = !state.past.length;
    buttons.redo.disabled = !state.future.length;
    if (document.activeElement !== count) count.value = String(state.sampling.max_tokens);
    byId("edit").setAttribute("aria-pressed", String(editing));
    byId("read").setAttribute("aria-pressed", String(!editing));
  });
}

/** 回到改文字。 */
export async function edit() {
  await stop();
  if (branch().draft === null) amend({ draft: textNow() });
  byId("draft").focus();
}

/** 颜色照什么：四选一，与它的图例。 */
function colours() {
  const legend = el("span", { class: "legend", id: "legend" });
  const choice = el("select", {
    id: "colour", label: "colour.label",
    onchange: () => set({ colour: /** @type {State["colour"]} */ (choice.value) }),
  });
  for (const name of ["probability", "rank", "entropy", "none"]) {
    choice.append(el("option", { value: name, say: `colour.${name}` }));
  }
  on(["colour", "lang"], ({ colour }) => {
    choice.value = colour;
    const edges = {
      probability: ["≥50%", "≥10%", "≥1%", "≥0.1%", "<0.1%"],
      rank: ["1", "≤10", "≤100", "≤1000", ">1000"],
      entropy: ["<0.5", "<1.5", "<3", "<5", "≥5"],
      none: [],
    }[colour];
    legend.replaceChildren(
      ...edges.map((text, i) => el("span", { class: `swatch c${i}`, text })));
  });
  return el("div", { class: "colours" }, choice, legend);
}

/** 画过的：词元，与它的文字解码到哪里（半个字符等下一个词元来补全）。 */
let drawn = { tokens: /** @type {readonly Token[]} */ ([]), lang: "", decoder: fresh() };

function fresh() {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}

/** @param {State} state @param {HTMLElement} paper */
function draw(state, paper) {
  const { tokens } = branch(state);
  const same = drawn.tokens.every((old, i) => old === tokens[i]);
  if (!same || drawn.lang !== state.lang) {
    if (paper.contains(document.activeElement)) paper.focus();
    paper.replaceChildren();
    drawn = { tokens: [], lang: state.lang, decoder: fresh() };
  }
  for (const [i, token] of tokens.slice(drawn.tokens.length).entries()) {
    paper.append(piece(token, drawn.tokens.length + i));
  }
  drawn.tokens = tokens;
  const items = /** @type {HTMLCollectionOf<HTMLElement>} */ (paper.children);
  const most = state.tint ? Math.max(...Array.from(state.tint.weights), 1e-9) : 1;
  for (let i = 0; i < items.length; i += 1) {
    const item = items[i];
    const token = tokens[i];
    if (!item || !token) continue;
    const found = state.tint ? tinted(state.tint, i, most) : mark(level(token, state.colour), "c");
    const name = `tok${found}${i === state.focus ? " here" : ""}${token.by === "model" ? " made" : ""}`;
    if (item.className !== name) item.className = name;
  }
  const here = items[Math.min(state.focus, items.length - 1)];
  if (here && !document.activeElement?.matches("#tokens .tok")) settle(paper, ".tok", here);
  for (const item of paper.querySelectorAll("[aria-selected=true]")) {
    if (item !== items[state.focus]) item.setAttribute("aria-selected", "false");
  }
  items[state.focus]?.setAttribute("aria-selected", "true");
}

/** @param {number | null} step @param {string} kind */
function mark(step, kind) {
  return step === null ? "" : ` ${kind}${step}`;
}

/** 注意力借正文的颜色：相对最大的权重分四级。 @param {NonNullable<State["tint"]>} tint @param {number} i @param {number} most */
function tinted(tint, i, most) {
  if (i > tint.from) return " beyond";
  const share = (tint.weights[i] ?? 0) / most;
  return mark([0.05, 0.2, 0.45, 0.75].filter((edge) => share >= edge).length, "a");
}

/** @param {Token} token @param {number} at */
function piece(token, at) {
  const special = token.id === separator();
  const bytes = new Uint8Array(token.bytes);
  const text = special ? "⊣" : drawn.decoder.decode(bytes, { stream: true });
  const item = el("span", { role: "option", tabindex: "-1", "data-at": at, "aria-selected": "false" });
  item.setAttribute("aria-label", told(token, at));
  // 没有约过的数，给要核对的人。
  if (token.logprob !== null) {
    Object.assign(item.dataset, { logprob: token.logprob, rank: token.rank, entropy: token.entropy });
  }
  // 换行既要看得见，也要真的换；没有文字的（半个字符）留一条细的。
  item.textContent = text === "" ? "\u200a⋯" : pictured(text).replace(/\n/g, "↵\n");
  return item;
}
