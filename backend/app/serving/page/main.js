// 开张：问服务器有哪些模型，把各块装上，认键。

import { ApiProblem, json, setKey } from "./api.js";
import { byId, el, rove, say, settle, translate } from "./dom.js";
import { adopt, focusOn, get, modelKey, on, set } from "./store.js";
import { attention } from "./views/attention.js";
import { branches } from "./views/branches.js";
import { engine } from "./views/engine.js";
import { lens } from "./views/lens.js";
import { notebook } from "./views/notebook.js";
import { sampling } from "./views/sampling.js";
import { tokenizer } from "./views/tokenizer.js";
import { training } from "./views/training.js";
import { change, explained, go, stepBack, stepForward, stop, textNow } from "./write.js";

const VIEWS = { branches, sampling, tokenizer, attention, lens, training, engine };

/** 问一遍有什么；钥匙不对就请人给，服务器换了页面的版本就请人重新载入。 */
async function load() {
  try {
    const [props, info] = await Promise.all([json("/props"), json("/v1/models")]);
    const names = info.data.map((/** @type {any} */ one) => one.id);
    const model = names.includes(get().model) ? get().model : names[0] ?? "";
    for (const name of names) {
      const told = await json(`/tokenizer_info?model=${encodeURIComponent(name)}`);
      props.models[name].separator = told.eos_token_id;
    }
    const before = modelKey();
    const text = textNow();
    set({ models: props.models, problem: null });
    if (modelKey(model) !== before) adopt(model, text);
    const mine = document.querySelector("meta[name=version]")?.getAttribute("content");
    if (props.page_version !== mine) outdated();
  } catch (error) {
    if (!(error instanceof ApiProblem)) throw error;
    if (error.status === 401) askKey();
    set({ problem: explained(error, () => void load()) });
  }
}

function outdated() {
  if (document.getElementById("outdated")) return;
  byId("notices").append(
    el("div", { id: "outdated", class: "notice", role: "alert" }, el("span", { say: "outdated" }),
      el("button", { type: "button", say: "reload", onclick: () => location.reload() })));
}

function askKey() {
  const box = /** @type {HTMLDialogElement} */ (byId("key"));
  const field = el("input", { type: "password", autocomplete: "off", id: "key-field", label: "key.label" });
  const form = el("form", { method: "dialog" },
    el("h2", { id: "key-title", say: "key.title" }), el("p", { say: "key.what" }), field,
    el("button", { class: "primary", say: "key.use" }));
  form.addEventListener("submit", () => {
    setKey(field.value);
    void load();
  });
  box.replaceChildren(form);
  if (!box.open) box.showModal();
}

const KEYS = [
  ["Ctrl+Enter", "help.continue"], ["Esc", "help.stop"], ["Ctrl+Z", "help.undo"],
  ["Ctrl+Shift+Z", "help.redo"], ["Tab", "help.tab"], ["← ↑ → ↓", "help.arrows"],
  ["Enter", "help.enter"], ["?", "help.help"],
];

function help() {
  const box = /** @type {HTMLDialogElement} */ (byId("help"));
  const rows = KEYS.flatMap(([key, text]) => [
    el("dt", {}, el("kbd", { text: key })), el("dd", { say: text })]);
  box.replaceChildren(
    el("form", { method: "dialog" },
      el("h2", { id: "help-title", say: "help.title" }), el("p", { say: "help.what" }),
      el("dl", { class: "keys" }, ...rows), el("button", { class: "primary", say: "close" })));
  if (!box.open) box.showModal();
}

/** 顶上一行：哪个模型，语言，明暗，帮助。 */
function settings() {
  const model = el("select", { id: "model", label: "model", onchange: () => void change(model.value) });
  const lang = el("button", {
    id: "lang", type: "button", say: "lang", label: "lang.label",
    onclick: () => set({ lang: get().lang === "en" ? "zh" : "en" }),
  });
  const theme = el("select", {
    id: "theme", label: "theme",
    onchange: () => set({ theme: /** @type {"auto" | "light" | "dark"} */ (theme.value) }),
  });
  for (const name of ["auto", "light", "dark"]) {
    theme.append(el("option", { value: name, say: `theme.${name}` }));
  }
  byId("settings").append(model, theme, lang,
    el("button", { id: "help-button", type: "button", text: "?", label: "help.title", onclick: help }));
  on(["models", "model"], (state) => {
    model.replaceChildren(...Object.keys(state.models).map((name) => el("option", { value: name, text: name })));
    model.value = state.model;
    model.hidden = Object.keys(state.models).length < 2;
  });
  on(["theme"], (state) => {
    theme.value = state.theme;
    document.documentElement.dataset.theme = state.theme;
  });
  on(["lang"], (state) => {
    document.documentElement.lang = state.lang === "zh" ? "zh-Hans" : "en";
    document.title = say("title");
    translate(document);
  });
  on(["models", "model", "lang"], (state) => {
    const facts = state.models[state.model];
    byId("facts").textContent = facts ? described(state.model, facts) : "";
  });
}

/** @param {string} name @param {import("./store.js").Facts} facts */
function described(name, facts) {
  const parts = [name];
  if (facts.parameters) parts.push(`${short(facts.parameters)} ${say("facts.parameters")}`);
  if (facts.layers) parts.push(say("facts.shape", { n: facts.layers, h: facts.heads, d: facts.width }));
  parts.push(say("facts.context", { n: facts.context }), say("facts.vocab", { n: facts.vocab_size }));
  return parts.join(" · ");
}

/** @param {number} n */
function short(n) {
  if (n >= 1e9) return `${(n / 1e9).toFixed(1)}B`;
  return n >= 1e6 ? `${(n / 1e6).toFixed(1)}M` : `${(n / 1e3).toFixed(1)}k`;
}

function tabs() {
  const box = byId("tabs");
  for (const name of Object.keys(VIEWS)) {
    box.append(el("button", {
      type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`,
      tabindex: "-1", say: `${name}.tab`, onclick: () => set({ view: name, tint: null }),
    }));
  }
  rove(box, "[role=tab]", () => 0, (item) => item.click());
  on(["view"], ({ view }) => {
    for (const name of Object.keys(VIEWS)) {
      const tab = byId(`tab-${name}`);
      tab.setAttribute("aria-selected", String(name === view));
      byId(`view-${name}`).hidden = name !== view;
      if (name === view) settle(box, "[role=tab]", tab);
    }
  });
}

function notices() {
  on(["problem", "lang"], ({ problem }) => {
    document.getElementById("problem")?.remove();
    if (!problem) return;
    const box = el("div", { id: "problem", class: "notice bad", role: "alert" },
      el("span", { text: problem.message }));
    const { retry } = problem;
    if (retry) {
      const again = async () => {
        await load();
        if (!get().problem) retry();
      };
      box.append(el("button", { type: "button", id: "retry", say: "retry", onclick: () => void again() }));
    }
    box.append(el("button", {
      type: "button", say: "dismiss", onclick: () => set({ problem: null }) }));
    byId("notices").append(box);
  });
  on(["said"], ({ said }) => {
    byId("said").textContent = said;
  });
}

/** 到别的可能里去：在正文的一个词元上按了 Enter。 */
function choose(/** @type {number} */ at) {
  focusOn(at);
  set({ view: "branches", tint: null });
  requestAnimationFrame(() => {
    const first = document.querySelector("#likely [tabindex='0']");
    if (first instanceof HTMLElement) first.focus();
  });
}

function keys(/** @type {KeyboardEvent} */ event) {
  const typing = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLInputElement;
  const control = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (control && event.key === "Enter") void go(get().sampling.max_tokens);
  else if (event.key === "Escape" && get().writing) void stop();
  // 在输入框里，撤销是输入框自己的。
  else if (control && event.key.toLowerCase() === "z" && !typing) {
    void (event.shiftKey ? stepForward() : stepBack());
  } else if (event.key === "?" && !typing && !control) help();
  else return;
  event.preventDefault();
}

settings();
notices();
notebook(choose);
for (const view of Object.values(VIEWS)) view();
tabs();
document.addEventListener("keydown", keys);
void load();
