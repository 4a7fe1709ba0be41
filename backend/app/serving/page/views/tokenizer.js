// 分词器：打字时就看见文字怎样成为号。停下 150 毫秒才问一次。

import { json } from "../api.js";
import { byId, el, opening, rove, say, settle, visible } from "../dom.js";
import { get, on } from "../store.js";
import { problem, textNow } from "../write.js";

const PAUSE = 150;

export function tokenizer() {
  const root = byId("view-tokenizer");
  opening(root, "tokenizer", "backend/app/data/tokenizers.py", "backend/app/serving/api/routes.py");
  const area = el("textarea", {
    id: "pieces-text", rows: "4", label: "tokenizer.label", spellcheck: "false", hint: "tokenizer.hint",
  });
  const take = el("button", { type: "button", say: "tokenizer.take", onclick: () => {
    area.value = textNow();
    void ask();
  } });
  const counts = el("p", { id: "pieces-count", class: "about", "aria-live": "polite" });
  const list = el("ol", { id: "pieces", class: "pieces", label: "tokenizer.list", role: "list" });
  root.append(area, el("div", { class: "row" }, take), counts, list);
  rove(list, ".piece");

  let timer = 0;
  let asked = 0;
  area.addEventListener("input", () => {
    window.clearTimeout(timer);
    timer = window.setTimeout(() => void ask(), PAUSE);
  });

  async function ask() {
    asked += 1;
    const mine = asked;
    const text = area.value;
    try {
      const body = { model: get().model, prompt: text, with_pieces: true };
      const found = await json("/tokenize", body);
      // 慢的回答可能晚到：只画最后问的。
      if (mine === asked) draw(text, found);
    } catch (error) {
      const message = problem(error);
      if (mine === asked) counts.textContent = message;
    }
  }

  /** @param {string} text @param {any} found */
  function draw(text, found) {
    const bytes = new TextEncoder().encode(text).length;
    const n = found.count;
    counts.textContent = say("tokenizer.count", {
      n, characters: [...text].length, bytes, context: found.max_model_len,
      each: n ? (bytes / n).toFixed(2) : "0",
    }) + (n > found.pieces.length ? ` ${say("tokenizer.cut", { n: found.pieces.length })}` : "");
    const items = found.pieces.map((/** @type {any} */ one, /** @type {number} */ i) => {
      const hex = one.bytes.map((/** @type {number} */ b) => b.toString(16).padStart(2, "0")).join(" ");
      const item = el("li", { class: `piece k${i % 4}`, tabindex: "-1", "data-id": one.id },
        el("span", { class: "word", text: visible(one.text) }),
        el("span", { class: "number", text: String(one.id) }), el("span", { class: "hex", text: hex }));
      item.setAttribute("aria-label", say("tokenizer.one", { at: i + 1, name: visible(one.text), id: one.id, hex }));
      return item;
    });
    list.replaceChildren(...items);
    if (items[0]) settle(list, ".piece", items[0]);
  }

  on(["view", "model", "models", "lang"], ({ view, model }) => {
    if (view !== "tokenizer" || !model) return;
    if (!area.value) area.value = textNow();
    void ask();
  });
}
