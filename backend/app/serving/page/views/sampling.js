// 采样：下一个词元的分布，与每个旋钮切掉了什么。logits 来自服务器一次，其余在这里算（filters.js）。

import { unpack } from "../api.js";
import { bar, byId, el, opening, percent, rove, say, settle, visible } from "../dom.js";
import { entropy, ranked, softmax, stages } from "../filters.js";
import { limit, looking } from "../looking.js";
import { branch, get, on, set, USUAL } from "../store.js";
import { pieces } from "../write.js";

/** @typedef {import("../store.js").Sampling} Sampling */
/** @typedef {import("../filters.js").Numbers} Numbers */

const SHOWN = 16;
/** 滑块：名字、最小、最大、一步。 @type {[Exclude<keyof Sampling, "logit_bias" | "seed" | "max_tokens">, number, number, number][]} */
const KNOBS = [
  ["temperature", 0, 2, 0.05], ["top_k", 0, 200, 1], ["top_p", 0, 1, 0.01], ["min_p", 0, 1, 0.01],
  ["repetition_penalty", 0.5, 2, 0.05], ["presence_penalty", -2, 2, 0.1],
  ["frequency_penalty", -2, 2, 0.1],
];

export function sampling() {
  const root = byId("view-sampling");
  opening(root, "sampling", "backend/app/generation/sampling.py", "backend/app/serving/draws.py",
    "backend/app/serving/page/filters.js");
  const about = el("p", { id: "next-about", class: "about", "aria-live": "polite" });
  const steps = el("table", { id: "stages", class: "stages" });
  const list = el("ol", { id: "next", class: "likely two", role: "listbox", label: "next.label" });
  root.append(knobs(), about,
    el("div", { class: "scroll" }, steps), el("p", { class: "fine", say: "next.key" }), list);
  rove(list, ".one", () => 1);
  let turn = 0;

  looking("sampling", ["book", "focus", "sampling"], {
    body: () => {
      const { ids } = place();
      const most = limit("tokens");
      if (!ids.length) return say("next.empty");
      if (ids.length > most) return say("next.long", { n: ids.length, most });
      return { prompt: ids, next_logits: true, top: 0 };
    },
    draw: (found) => void draw(unpack(found.next_logits).data),
    empty,
  });

  /** @param {string} message */
  function empty(message) {
    about.textContent = message;
    list.replaceChildren();
    steps.replaceChildren();
  }

  /** @param {ArrayLike<number>} logits */
  async function draw(logits) {
    const { prompt, made, at, end } = place();
    const every = stages(logits, get().sampling, prompt, made);
    const raw = softmax(logits);
    const after = softmax(every.at(-1)?.logits ?? []);
    const ids = [...new Set([...ranked(raw).slice(0, SHOWN), ...ranked(after).slice(0, 4)])];
    turn += 1;
    const mine = turn;
    const names = await pieces(ids);
    // 等名字的时候旋钮又动了：让后来的画。
    if (mine !== turn) return;
    about.textContent = say(end ? "next.end" : "next.at", { at: at + 1 });
    steps.replaceChildren(...waterfall(every, raw));
    const order = ranked(raw);
    const most = Math.max(...ids.map((id) => Math.max(raw[id] ?? 0, after[id] ?? 0)));
    const items = ids.map((id, i) => {
      const p = raw[id] ?? 0;
      const q = after[id] ?? 0;
      const cut = every.find((one) => one.logits[id] === -Infinity)?.name;
      const name = visible(names[i]?.text ?? "");
      const result = cut ? say("next.cut", { name: say(`stage.${cut}`) }) : percent(q);
      const item = el("li", {
        class: cut ? "one cut" : "one", role: "option", tabindex: "-1", "data-id": id, "data-p": p,
        "data-q": q, "aria-selected": "false",
      },
      el("span", { class: "rank", text: String(order.indexOf(id) + 1) }),
      el("span", { class: "word", text: name }),
      el("span", { class: "pair" }, bar(p / most, "raw"), bar(q / most, "after")),
      el("span", { class: "number", text: percent(p) }),
      el("span", { class: "number strong", text: result }));
      item.setAttribute("aria-label", say("next.one", { name, p: percent(p), result }));
      return item;
    });
    list.replaceChildren(...items);
    if (items[0]) settle(list, ".one", items[0]);
  }
}

/** 在问哪一个位置：焦点上的词元，或还没有写的那一个。 */
function place() {
  const { tokens } = branch();
  const at = get().focus;
  const end = at >= tokens.length;
  const ids = tokens.slice(0, at).map((one) => one.id);
  // 写它的那次请求里，哪些是提示、哪些是写的；惩罚要分清。
  const start = end ? at : Math.min(at, tokens[at]?.by === "model" ? tokens[at]?.start ?? at : at);
  return { ids, at, end, prompt: ids.slice(0, start), made: ids.slice(start) };
}

/** @param {{name: string, logits: Numbers}[]} every @param {Numbers} raw */
function waterfall(every, raw) {
  const head = el("tr", {}, ...["step", "kept", "mass", "entropy"].map((name) =>
    el("th", { scope: "col", say: `stages.${name}` })));
  const lines = every.map(({ name, logits }, i) => {
    const kept = logits.reduce((n, x) => n + (x > -Infinity ? 1 : 0), 0);
    const mass = logits.reduce((sum, x, id) => sum + (x > -Infinity ? raw[id] ?? 0 : 0), 0);
    const last = every[i - 1]?.logits;
    const idle = i > 0 && last !== undefined && logits.every((x, id) => x === last[id]);
    const found = entropy(softmax(logits));
    return el("tr", { class: idle ? "idle" : "", "data-stage": name, "data-kept": kept, "data-entropy": found },
      el("th", { scope: "row", say: `stage.${name}` }), el("td", { text: String(kept) }),
      el("td", { text: percent(mass) }), el("td", { text: found.toFixed(3) }));
  });
  return [el("thead", {}, head), el("tbody", {}, ...lines)];
}

function knobs() {
  const box = el("div", { class: "knobs", role: "group", label: "knobs" });
  for (const [name, min, max, step] of KNOBS) {
    const value = el("output", { for: `knob-${name}`, class: "number" });
    const slider = el("input", {
      id: `knob-${name}`, type: "range", min, max, step,
      oninput: () => set({ sampling: { ...get().sampling, [name]: slider.valueAsNumber } }),
    });
    box.append(el("div", { class: "knob" },
      el("label", { for: slider.id, say: `knob.${name}` }), value, slider));
    on(["sampling", "lang"], (state) => {
      const now = state.sampling[name];
      if (slider.valueAsNumber !== now) slider.value = String(now);
      const off = now === (name === "temperature" ? NaN : USUAL[name]);
      value.textContent = off ? say("knob.off") : String(now);
    });
  }
  const bias = el("input", { id: "knob-bias", type: "text", hint: "knob.bias.hint", spellcheck: "false" });
  const wrong = el("span", { class: "fine", role: "status" });
  bias.addEventListener("change", () => {
    const found = parseBias(bias.value, get().models[get().model]?.vocab_size ?? 0);
    wrong.textContent = found ? "" : say("knob.bias.wrong");
    if (found) set({ sampling: { ...get().sampling, logit_bias: found } });
  });
  const seed = el("input", { id: "knob-seed", type: "text", inputmode: "numeric", hint: "knob.seed.hint" });
  seed.addEventListener("change", () => {
    const given = seed.value.trim();
    // 更大的整数 JSON 写得出、双精度写不准。
    const valid = given === "" || (/^-?\d+$/.test(given) && Number.isSafeInteger(Number(given)));
    wrong.textContent = valid ? "" : say("knob.seed.wrong");
    if (valid) set({ sampling: { ...get().sampling, seed: given === "" ? null : Number(given) } });
  });
  box.append(
    el("div", { class: "knob" }, el("label", { for: "knob-bias", say: "knob.bias" }), bias),
    el("div", { class: "knob" }, el("label", { for: "knob-seed", say: "knob.seed" }), seed),
    wrong,
    el("button", { type: "button", id: "usual", say: "knob.usual", onclick: () => {
      bias.value = seed.value = "";
      set({ sampling: { ...USUAL, max_tokens: get().sampling.max_tokens } });
    } }));
  return box;
}

/** "262: -5, 13: 2" -> 号到偏置；写得不对是 null。 @param {string} text @param {number} width */
export function parseBias(text, width) {
  /** @type {Record<string, number>} */
  const found = {};
  for (const part of text.split(",").map((one) => one.trim()).filter(Boolean)) {
    const match = /^(\d{1,8})\s*:\s*(-?\d+(?:\.\d+)?)$/.exec(part);
    const [, id = "", value = ""] = match ?? [];
    if (!match || Number(id) >= width || Math.abs(Number(value)) > 100) return null;
    found[Number(id)] = Number(value);
  }
  return found;
}
