// 透镜：每一层现在就要说的话，是什么；残差流有多长、注意力与 MLP 各加了多少；词元去了哪几个专家。

import { unpack } from "../api.js";
import { bar, byId, el, opening, percent, rove, say, settle, visible } from "../dom.js";
import { limit, looking, prefix } from "../looking.js";
import { branch, focusOn, get, on } from "../store.js";

/** @typedef {{data: ArrayLike<number>, shape: number[]}} Numbers */
/**
 * @typedef {{tokens: unknown, rows: number, size: number, id: Numbers, p: Numbers, rank: Numbers, kl: Numbers,
 *   entropy: Numbers, text: string[][][], finalNorm: boolean, stream: Numbers, attention: Numbers,
 *   mlp: Numbers, additive: boolean, routing: Routing | null}} Found
 * @typedef {{layers: number[], experts: number, k: number, expert: Numbers, weight: Numbers}} Routing
 */

const NONE = 4294967295;
const BEST = 5;
// 一次画这么多列：格子是真的元素，读屏与方向键都走得到。
const COLUMNS = 64;
/** 颜色照什么 -> 五级的界，从浅到深。 @type {Record<string, number[]>} */
const EDGES = { rank: [1, 10, 100, 1000], kl: [0.1, 0.5, 1.5, 4], entropy: [0.5, 1.5, 3, 5] };

export function lens() {
  const root = byId("view-lens");
  opening(root, "lens", "backend/app/inspection/lens.py", "backend/app/inspection/walk.py");
  const about = el("p", { class: "about", role: "status" });
  const choice = el("select", { id: "lens-colour", label: "colour.label", onchange: () => draw() });
  for (const name of Object.keys(EDGES)) choice.append(el("option", { value: name, say: `lens.${name}` }));
  const legend = el("span", { class: "legend" });
  const table = el("table", { id: "lens-table", class: "lens", role: "grid", label: "lens.label" });
  const reading = el("p", { id: "lens-reading", class: "reading", "aria-live": "polite" });
  const best = el("ol", { id: "lens-best", class: "likely", role: "list", label: "lens.best" });
  const norms = el("table", { id: "norms", class: "norms" });
  const additive = el("p", { class: "fine" });
  const routing = el("div", { id: "routing" });
  const body = el("div", {},
    el("div", { class: "row colours start" }, choice, legend), el("div", { class: "scroll tall" }, table), reading, best,
    el("h3", { say: "norms.title" }), el("p", { class: "what", say: "norms.what" }),
    el("div", { class: "scroll" }, norms), additive, routing);
  root.append(about, body);

  /** @type {Found | null} */
  let found = null;
  let layer = 0;

  looking("lens", ["book"], {
    body: (state) => {
      const { ids, cut } = prefix(Math.min(COLUMNS, limit("lens_tokens")));
      if (!ids.length) return say("looking.empty");
      about.textContent = cut ? say("looking.cut", { n: ids.length }) : "";
      const experts = Boolean(state.models[state.model]?.experts);
      return { prompt: ids, lens: true, norms: true, top: 0, ...(experts ? { routing: true } : {}) };
    },
    draw: (answer) => {
      const fresh = read(answer);
      layer = found?.rows === fresh.rows ? layer : fresh.rows - 1;
      found = fresh;
      body.hidden = false;
      draw();
    },
    empty: (message) => {
      body.hidden = true;
      about.textContent = message;
    },
  });

  const columns = () => found?.size ?? 1;
  rove(table, "td", columns, (cell) => {
    layer = Number(cell.dataset.layer);
    focusOn(Number(cell.dataset.at));
  });
  table.addEventListener("click", (event) => {
    const cell = /** @type {HTMLElement} */ (event.target).closest("td");
    if (cell instanceof HTMLElement) cell.focus();
  });

  function draw() {
    if (!found || get().view !== "lens") return;
    const by = choice.value;
    const edges = EDGES[by] ?? [];
    legend.replaceChildren(...levels(by).map((text, i) => el("span", { class: `swatch c${i}`, text })));
    table.replaceChildren(...lines(found, by, edges));
    drawRouting(routing, found.routing);
    point();
  }

  /** 焦点上的一格：五个最可能的，与各层的长度。 */
  function point() {
    if (!found || get().view !== "lens" || found.tokens !== branch().tokens) return;
    const at = Math.min(get().focus, found.size - 1);
    const here = table.querySelector(`td[data-layer="${layer}"][data-at="${at}"]`);
    for (const old of table.querySelectorAll(".here")) old.classList.remove("here");
    here?.classList.add("here");
    if (here && !table.contains(document.activeElement)) settle(table, "td", here);
    reading.textContent = told(found, layer, at);
    const i = layer * found.size + at;
    best.replaceChildren(...Array.from({ length: BEST }, (_, n) => {
      const p = found?.p.data[i * BEST + n] ?? 0;
      const most = found?.p.data[i * BEST] ?? 1;
      return el("li", { class: "one", "data-p": p, "data-id": found?.id.data[i * BEST + n] ?? 0 },
        el("span", { class: "rank", text: String(n + 1) }),
        el("span", { class: "word", text: visible(found?.text[layer]?.[at]?.[n] ?? "") }),
        bar(p / most, "raw"), el("span", { class: "number", text: percent(p) }));
    }));
    norms.replaceChildren(...lengths(found, at));
    additive.textContent = say(found.additive ? "norms.additive" : "norms.scaled");
  }

  on(["focus", "lang"], point);
}

/** @param {any} answer @returns {Found} */
function read(answer) {
  const { lens: one, norms, routing } = answer;
  const [rows = 0, size = 0] = one.rank.shape;
  return {
    tokens: branch().tokens, rows, size, id: unpack(one.top_id), p: unpack(one.top_p), rank: unpack(one.rank),
    kl: unpack(one.kl), entropy: unpack(one.entropy), text: one.top_text,
    finalNorm: answer.final_norm, stream: unpack(norms.stream), attention: unpack(norms.attention),
    mlp: unpack(norms.mlp), additive: norms.additive,
    routing: routing ? {
      layers: routing.layers, experts: routing.experts, k: routing.top_k,
      expert: unpack(routing.expert), weight: unpack(routing.weight),
    } : null,
  };
}

/** @param {string} by */
function levels(by) {
  if (by === "rank") return ["1", "≤10", "≤100", "≤1000", ">1000"];
  const edges = EDGES[by] ?? [];
  return [...edges.map((edge) => `<${edge}`), `≥${edges.at(-1)}`];
}

/** @param {Found} found @param {string} by @param {number} i */
function value(found, by, i) {
  const numbers = by === "rank" ? found.rank : by === "kl" ? found.kl : found.entropy;
  return numbers.data[i] ?? 0;
}

/** 最上面是模型的输出，最下面是嵌入；一列是一个词元之后要说的。 @param {Found} found @param {string} by @param {number[]} edges */
function lines(found, by, edges) {
  const { tokens } = branch();
  const head = el("tr", {}, el("th", { scope: "col", say: "lens.corner" }),
    ...Array.from({ length: found.size }, (_, at) =>
      el("th", { scope: "col", text: visible(tokens[at]?.text ?? "") })));
  const rows = [];
  for (let layer = found.rows - 1; layer >= 0; layer -= 1) {
    const cells = Array.from({ length: found.size }, (_, at) => {
      const i = layer * found.size + at;
      const x = value(found, by, i);
      const level = by === "rank" && x === NONE ? "" : ` c${edges.filter((edge) => x >= edge).length}`;
      const right = found.rank.data[i] === 0 ? " right" : "";
      const cell = el("td", { class: `cell${level}${right}`, role: "gridcell", tabindex: "-1",
        "data-layer": layer, "data-at": at, text: visible(found.text[layer]?.[at]?.[0] ?? "") });
      cell.setAttribute("aria-label", told(found, layer, at));
      return cell;
    });
    rows.push(el("tr", {}, el("th", { scope: "row", text: named(found, layer) }), ...cells));
  }
  return [el("thead", {}, head), el("tbody", {}, ...rows)];
}

/** @param {Found} found @param {number} layer */
function named(found, layer) {
  if (layer === 0) return say("lens.embedding");
  return layer === found.rows - 1 ? say("lens.output", { n: layer }) : String(layer);
}

/** @param {Found} found @param {number} layer @param {number} at */
function told(found, layer, at) {
  const i = layer * found.size + at;
  const { tokens } = branch();
  const rank = found.rank.data[i] ?? NONE;
  return say(rank === NONE ? "lens.last" : "lens.told", {
    layer: named(found, layer), at: at + 1, name: visible(tokens[at]?.text ?? ""),
    next: visible(tokens[at + 1]?.text ?? ""), rank: rank + 1,
    word: visible(found.text[layer]?.[at]?.[0] ?? ""), p: percent(found.p.data[i * BEST] ?? 0),
    kl: (found.kl.data[i] ?? 0).toFixed(3), h: (found.entropy.data[i] ?? 0).toFixed(3),
  });
}

/** @param {Found} found @param {number} at */
function lengths(found, at) {
  const most = Math.max(...Array.from({ length: found.rows }, (_, n) => found.stream.data[n * found.size + at] ?? 0));
  const head = el("tr", {}, ...["lens.corner", "norms.stream", "norms.attention", "norms.mlp"].map((name) =>
    el("th", { scope: "col", say: name })));
  /** @param {number | null} x @param {string} kind */
  const cell = (x, kind) => el("td", { "data-x": x },
    x === null ? "" : bar(x / most, kind), el("span", { class: "number", text: x === null ? "" : x.toFixed(2) }));
  const rows = Array.from({ length: found.rows }, (_, n) => {
    const i = n * found.size + at;
    const j = (n - 1) * found.size + at;
    return el("tr", {}, el("th", { scope: "row", text: named(found, n) }),
      cell(found.stream.data[i] ?? 0, "raw"), cell(n ? found.attention.data[j] ?? 0 : null, "after"),
      cell(n ? found.mlp.data[j] ?? 0 : null, "mlp"));
  }).reverse();
  return [el("thead", {}, head), el("tbody", {}, ...rows)];
}

/** 每个词元在每层去了哪个专家；号写在格子里，颜色只是帮着看。 @param {HTMLElement} box @param {Routing | null} found */
function drawRouting(box, found) {
  box.replaceChildren();
  if (!found) return;
  const size = found.expert.shape[1] ?? 0;
  const { tokens } = branch();
  const head = el("tr", {}, el("th", { scope: "col", say: "lens.corner" }),
    ...Array.from({ length: size }, (_, t) => el("th", { scope: "col", text: visible(tokens[t]?.text ?? "") })));
  const rows = found.layers.map((layer, l) => el("tr", {},
    el("th", { scope: "row", text: String(layer + 1) }),
    ...Array.from({ length: size }, (_, t) => {
      const i = (l * size + t) * found.k;
      const every = Array.from({ length: found.k }, (_, n) =>
        `${found.expert.data[i + n]} (${percent(found.weight.data[i + n] ?? 0)})`);
      const cell = el("td", { class: `expert k${(found.expert.data[i] ?? 0) % 4}`, text: every.map((one) => one.split(" ")[0]).join(" ") });
      cell.title = every.join(", ");
      return cell;
    })));
  box.append(el("h3", { say: "routing.title" }), el("p", { class: "what", say: "routing.what" }),
    el("div", { class: "scroll" }, el("table", { class: "lens" }, el("thead", {}, head), el("tbody", {}, ...rows))));
}
