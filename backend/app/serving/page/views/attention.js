// 注意力：一层的每个头，一行是一个词元往回看着谁。选中的一行也染在正文上。

import { unpack } from "../api.js";
import { bar, byId, el, opening, percent, rove, say, settle, visible } from "../dom.js";
import { inspect, limit, looking, prefix } from "../looking.js";
import { paint, shades } from "../paint.js";
import { branch, focusOn, get, modelKey, on, set } from "../store.js";
import { fail } from "../write.js";

/** @typedef {{tokens: unknown, layer: number, layers: number, heads: number, size: number, weights: Uint8Array, hidden: Uint8Array}} Maps */

const NEAREST = 8;
const SIDE = 440;

export function attention() {
  const root = byId("view-attention");
  opening(root, "attention", "backend/app/inspection/attention.py", "backend/app/inspection/heads.py");
  const about = el("p", { class: "about", role: "status" });
  const layers = el("div", { id: "layers", class: "strip", role: "group", label: "attention.layers" });
  const heads = el("div", { id: "heads", class: "heads", role: "group", label: "attention.heads" });
  const map = el("canvas", { id: "map", tabindex: "0", role: "img" });
  const cell = el("p", { id: "cell", class: "reading", "aria-live": "polite" });
  const list = el("ol", { id: "looked", class: "likely", label: "attention.list", role: "list" });
  const score = el("button", { id: "score", type: "button", say: "attention.score", onclick: () => void scored() });
  const body = el("div", {}, el("div", { class: "row" }, layers, score), heads,
    el("div", { class: "beside" }, el("div", {}, map, key()), el("div", {}, cell, list)));
  root.append(about, body);

  let layer = 0;
  let head = 0;
  let column = 0;
  /** @type {Maps | null} */
  let maps = null;
  /** @type {{model: string, induction: ArrayLike<number>, previous: ArrayLike<number>, first: ArrayLike<number>} | null} */
  let scores = null;

  const again = looking("attention", ["book"], {
    body: (state) => {
      layer = Math.min(layer, (state.models[state.model]?.["layers"] ?? 1) - 1);
      const { ids, cut } = prefix(limit("tokens"));
      if (!ids.length) return say("looking.empty");
      about.textContent = cut ? say("looking.cut", { n: ids.length }) : "";
      return { prompt: ids, attention: [layer], top: 0 };
    },
    draw: (found) => {
      const { shape, data } = unpack(found.attention.weights);
      maps = {
        tokens: branch().tokens,
        layer: found.attention.layers[0], layers: found.layers, heads: found.heads, size: shape[2] ?? 0,
        weights: /** @type {Uint8Array} */ (data),
        hidden: /** @type {Uint8Array} */ (unpack(found.attention.hidden).data),
      };
      head = Math.min(head, maps.heads - 1);
      body.hidden = false;
      draw();
    },
    empty: (message) => {
      maps = null;
      body.hidden = true;
      about.textContent = message;
      if (get().view === "attention") set({ tint: null });
    },
  });

  rove(layers, "button", () => 0);
  rove(heads, "button", () => 0);

  function draw() {
    if (!maps || get().view !== "attention") return;
    const { layers: count, size } = maps;
    strip(layers, count, layer, (at) => {
      layer = at;
      draw();
      void again();
    });
    thumbs(size);
    point();
  }

  /** 焦点动了：大图、正文的颜色与那一行的话；小图不必重画。 */
  function point() {
    // 走到别的枝上、新的图还没有来：不拿旧的图说新的字。
    if (!maps || get().view !== "attention" || maps.tokens !== branch().tokens) return;
    captions();
    large();
    const query = Math.min(get().focus, maps.size - 1);
    set({ tint: { weights: row(query), from: query } });
    read();
  }

  /** @param {number} size */
  function thumbs(size) {
    const count = maps?.heads ?? 0;
    if (heads.childElementCount !== count) {
      heads.replaceChildren(...Array.from({ length: count }, (_, at) =>
        el("button", { type: "button", tabindex: "-1", onclick: () => { head = at; point(); } },
          el("canvas", { "aria-hidden": "true" }), el("span", { class: "fine" }))));
    }
    const colours = shades();
    for (const [at, button] of [...heads.children].entries()) {
      const canvas = /** @type {HTMLCanvasElement} */ (button.firstElementChild);
      paint(canvas, size, 1, (q, k) => shade(at, q, k), colours);
    }
  }

  function captions() {
    if (!maps) return;
    for (const [at, button] of [...heads.children].entries()) {
      const held = scores?.model === modelKey() ? scores : null;
      const i = maps.layer * maps.heads + at;
      const found = held ? say("attention.scores", {
        i: (held.induction[i] ?? 0).toFixed(2), p: (held.previous[i] ?? 0).toFixed(2),
        f: (held.first[i] ?? 0).toFixed(2) }) : "";
      const text = say("attention.head", { n: at + 1 });
      if (button.lastElementChild) button.lastElementChild.textContent = found ? `${text} · ${found}` : text;
      button.setAttribute("aria-label", `${text} ${found}`);
      button.setAttribute("aria-pressed", String(at === head));
    }
    const here = heads.children[head];
    if (here && !heads.contains(document.activeElement)) settle(heads, "button", here);
  }

  /** 深浅 0 到 255；-1 = 图样不许看，-2 = 在后面。 @param {number} at @param {number} q @param {number} k */
  function shade(at, q, k) {
    if (!maps) return -2;
    const { size } = maps;
    if (k > q) return -2;
    return maps.hidden[q * size + k] ? -1 : maps.weights[(at * size + q) * size + k] ?? 0;
  }

  function large() {
    if (!maps) return;
    const { size } = maps;
    const query = Math.min(get().focus, size - 1);
    const each = Math.max(1, Math.floor(SIDE / size));
    paint(map, size, each, (q, k) => shade(head, q, k), shades(), { row: query, column });
    map.setAttribute("aria-label", say("attention.map", { layer: maps.layer + 1, head: head + 1, n: size }));
  }

  /** 一行的权重：8 位的平方根，平方回来。 @param {number} q */
  function row(q) {
    const size = maps?.size ?? 0;
    return Float64Array.from({ length: q + 1 }, (_, k) =>
      ((maps?.weights[(head * size + q) * size + k] ?? 0) / 255) ** 2);
  }

  function read() {
    if (!maps) return;
    const { tokens } = branch();
    const query = Math.min(get().focus, maps.size - 1);
    const weights = row(query);
    const shaded = column <= query ? shade(head, query, column) : -2;
    const given = { q: query + 1, query: visible(tokens[query]?.text ?? ""), k: column + 1, key: visible(tokens[column]?.text ?? "") };
    const word = shaded === -2 ? "attention.later" : shaded === -1 ? "attention.hidden" : "attention.cell";
    cell.textContent = say(word, { ...given, p: percent(weights[column] ?? 0), sum: weights.reduce((a, b) => a + b, 0).toFixed(2) });
    const order = [...weights.keys()].sort((a, b) => (weights[b] ?? 0) - (weights[a] ?? 0)).slice(0, NEAREST);
    const top = Math.max(weights[order[0] ?? 0] ?? 0, 1e-9);
    list.replaceChildren(...order.map((k) => el("li", { class: "one", "data-key": k, "data-p": weights[k] ?? 0 },
      el("span", { class: "rank", text: String(k + 1) }),
      el("span", { class: "word", text: visible(tokens[k]?.text ?? "") }),
      bar((weights[k] ?? 0) / top, "raw"), el("span", { class: "number", text: percent(weights[k] ?? 0) }))));
  }

  map.addEventListener("keydown", (event) => {
    const query = Math.min(get().focus, (maps?.size ?? 1) - 1);
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[/** @type {keyof typeof moves} */ (event.key)];
    if (!move) return;
    event.preventDefault();
    at(query + (move[0] ?? 0), column + (move[1] ?? 0));
  });
  map.addEventListener("click", (event) => {
    const each = map.clientWidth / (maps?.size ?? 1);
    at(Math.floor(event.offsetY / each), Math.floor(event.offsetX / each));
  });

  /** @param {number} query @param {number} key */
  function at(query, key) {
    const most = (maps?.size ?? 1) - 1;
    column = Math.max(0, Math.min(key, most));
    focusOn(Math.max(0, Math.min(query, most)));
    point();
  }

  /** 每个头在一段重复的随机词元上的分数；与正文无关，一个模型问一次。 */
  async function scored() {
    const mine = modelKey();
    try {
      const ids = branch().tokens.slice(0, 1).map((one) => one.id);
      const { head_scores: found } = await inspect({ model: get().model, prompt: ids, heads: true, top: 0 });
      scores = {
        model: mine, induction: unpack(found.induction).data, previous: unpack(found.previous).data,
        first: unpack(found.first).data,
      };
      draw();
    } catch (error) {
      fail(error, () => void scored());
    }
  }

  on(["focus"], point);
  on(["theme", "lang"], draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** 一排按钮，选着一个。 @param {HTMLElement} box @param {number} count @param {number} chosen @param {(at: number) => void} choose */
function strip(box, count, chosen, choose) {
  if (box.childElementCount !== count) {
    box.replaceChildren(...Array.from({ length: count }, (_, at) =>
      el("button", { type: "button", tabindex: "-1", text: String(at + 1), onclick: () => choose(at) })));
  }
  for (const [at, button] of [...box.children].entries()) {
    button.setAttribute("aria-pressed", String(at === chosen));
    button.setAttribute("aria-label", say("attention.layer", { n: at + 1 }));
  }
  const here = box.children[chosen];
  if (here && !box.contains(document.activeElement)) settle(box, "button", here);
}

/** 图例：从没有权重到全部，再加图样不许看的与在后面的。 */
function key() {
  return el("p", { class: "legend key" },
    el("span", { class: "swatch a0", text: "0" }), el("span", { class: "swatch a2", text: "25%" }),
    el("span", { class: "swatch a4", text: "100%" }),
    el("span", { class: "swatch hidden-cell", say: "attention.key.hidden" }));
}
