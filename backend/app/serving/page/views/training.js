// 训练的经过：同一段文字在一次训练的各个检查点下的概率，旁边是损失。两次训练可以并排。

import { events, json, unpack } from "../api.js";
import { byId, el, opening, percent, rove, say, settle, svg, visible } from "../dom.js";
import { limit, prefix } from "../looking.js";
import { branch, get, modelKey, on } from "../store.js";
import { problem, textOf } from "../write.js";

/**
 * @typedef {{step: number[], train: number[], val_step: number[], val: number[]}} Curve
 * @typedef {{tokens: {id: number, text: string}[], steps: number[], logprob: ArrayLike<number>, rank: ArrayLike<number>}} Scores
 */

const EDGES = [0.5, 0.1, 0.01, 0.001];
const WIDE = 340;
const HIGH = 170;
const PAD = 44;

export function training() {
  const root = byId("view-training");
  opening(root, "training", "backend/app/inspection/score.py",
    "backend/app/serving/api/inside/history.py");
  const second = el("select", { id: "second", label: "training.second", onchange: () => lay() });
  const pair = el("label", { class: "row" }, el("span", { say: "training.second" }), second);
  const runs = el("div", { id: "runs", class: "runs" });
  root.append(pair, runs);
  let laid = "";
  let control = new AbortController();

  function lay() {
    const { model, models } = get();
    const others = Object.keys(models).filter((name) => name !== model);
    pair.hidden = others.length === 0;
    const chosen = others.includes(second.value) ? second.value : "";
    second.replaceChildren(el("option", { value: "", say: "training.alone" }),
      ...others.map((name) => el("option", { value: name, text: name })));
    second.value = chosen;
    const names = chosen ? [model, chosen] : [model];
    const wanted = names.map(modelKey).join();
    if (laid === wanted) return;
    laid = wanted;
    control.abort();
    control = new AbortController();
    runs.replaceChildren(...names.map((name) => run(name, control.signal)));
  }

  on(["view", "model", "models"], ({ view, model }) => {
    if (view === "training" && model) lay();
  });
}

/** 一次训练：问、进度、画。 @param {string} model @param {AbortSignal} signal */
function run(model, signal) {
  const about = el("p", { class: "about", role: "status" });
  const progress = el("progress", { max: 1, value: 0, label: "training.progress" });
  progress.hidden = true;
  const ask = el("button", { type: "button", class: "primary ask", say: "training.ask", onclick: () => void read() });
  const shown = el("div", { class: "shown" });
  const box = el("section", { class: "run", "data-model": model }, el("h3", { text: model }), about,
    el("div", { class: "row" }, ask, progress), shown);
  /** @type {Curve | null} */
  let curve = null;

  async function know() {
    try {
      const found = await json(`/v1/history?model=${encodeURIComponent(model)}`);
      curve = found.curve;
      const n = found.checkpoints.length;
      ask.hidden = n === 0;
      about.textContent = n ? say("training.has", { n }) : `${say("training.without")} ${found.why ?? ""}`;
    } catch (error) {
      ask.hidden = true;
      about.textContent = problem(error);
    }
  }

  async function read() {
    const { ids } = prefix(limit("tokens"));
    if (branch().draft !== null || !ids.length) {
      about.textContent = say(ids.length ? "looking.editing" : "looking.empty");
      return;
    }
    // 另一个模型的分词器可能不同：给它文字，不给号。
    const prompt = model === get().model ? ids : textOf(branch().tokens.slice(0, ids.length));
    ask.disabled = true;
    progress.hidden = false;
    try {
      for await (const event of events("/v1/history", { model, prompt, steps: null }, signal)) {
        if (event.done !== undefined) {
          progress.max = event.of;
          progress.value = event.done;
        } else {
          const skipped = event.skipped.map((/** @type {any} */ one) => one.step).join(", ");
          if (skipped) about.textContent = say("training.skipped", { steps: skipped });
          const scores = { ...event, logprob: unpack(event.logprob).data, rank: unpack(event.rank).data };
          shown.replaceChildren(picture(scores, curve));
        }
      }
    } catch (error) {
      if (!signal.aborted) about.textContent = problem(error);
    } finally {
      ask.disabled = false;
      progress.hidden = true;
    }
  }

  void know();
  return box;
}

/** 滑块选一步，正文照那一步的模型染；选一个词元，看它的概率怎样变。 @param {Scores} scores @param {Curve | null} curve */
function picture(scores, curve) {
  const { tokens, steps } = scores;
  const size = tokens.length;
  let step = steps.length - 1;
  let at = steps.length ? most(scores) : 0;
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: step, label: "training.step",
    class: "steps", oninput: () => { step = slider.valueAsNumber; draw(); } });
  const when = el("output", { class: "number" });
  const text = el("div", { class: "paper small", role: "listbox", label: "training.text" });
  const reading = el("p", { class: "reading", "aria-live": "polite" });
  const charts = el("div", { class: "charts" });
  const words = tokens.map((token, i) => el("span", { class: "tok", role: "option", tabindex: "-1", "data-at": i,
    "aria-selected": "false", text: token.text.replace(/\n/g, "↵\n") }));
  text.append(...words);
  rove(text, ".tok", () => 0, (item) => { at = Number(item.dataset.at); draw(); });
  text.addEventListener("click", (event) => {
    const item = /** @type {HTMLElement} */ (event.target).closest(".tok");
    if (item instanceof HTMLElement) item.focus();
  });

  /** @param {number} c @param {number} t */
  const p = (c, t) => Math.exp(scores.logprob[c * size + t] ?? NaN);

  function draw() {
    const now = steps[step] ?? 0;
    when.textContent = String(now);
    slider.setAttribute("aria-valuetext", say("training.at", { step: now }));
    for (const [t, item] of words.entries()) {
      const found = p(step, t);
      item.className = `tok${t ? ` c${EDGES.filter((edge) => found < edge).length}` : ""}${t === at ? " here" : ""}`;
      item.setAttribute("aria-selected", String(t === at));
      item.setAttribute("aria-label", told(step, t));
    }
    const here = words[at];
    if (here && !text.contains(document.activeElement)) settle(text, ".tok", here);
    reading.textContent = told(step, at);
    const line = steps.map((x, c) => ({ x, y: p(c, at) })).filter((one) => !Number.isNaN(one.y));
    const span = [Math.min(0, ...steps), Math.max(...steps, ...(curve?.step ?? []))];
    charts.replaceChildren(
      chart(say("training.chart.p", { name: visible(tokens[at]?.text ?? "") }), span, [line], [0, 1], now, percent),
      ...(curve ? [chart(say("training.chart.loss"), span, [zip(curve.step, curve.train), zip(curve.val_step, curve.val)],
        null, now, (x) => x.toFixed(1))] : []));
  }

  /** @param {number} c @param {number} t */
  function told(c, t) {
    const given = { step: steps[c] ?? 0, at: t + 1, name: visible(tokens[t]?.text ?? "") };
    if (t === 0) return say("training.first", given);
    return say("training.told", { ...given, p: percent(p(c, t)), rank: (scores.rank[c * size + t] ?? 0) + 1 });
  }

  draw();
  return el("div", {}, el("label", { class: "slider" }, el("span", { say: "training.step" }), when, slider), text, reading, charts);
}

/** 学得最多的词元：头尾两步的对数概率差最大的。 @param {Scores} scores */
function most({ tokens, steps, logprob }) {
  const size = tokens.length;
  const gain = (/** @type {number} */ t) => (logprob[(steps.length - 1) * size + t] ?? 0) - (logprob[t] ?? 0);
  let best = Math.min(1, size - 1);
  for (let t = 2; t < size; t += 1) if (gain(t) > gain(best)) best = t;
  return best;
}

/** @param {number[]} xs @param {number[]} ys */
function zip(xs, ys) {
  return xs.map((x, i) => ({ x, y: ys[i] ?? NaN })).filter((one) => Number.isFinite(one.y));
}

/**
 * 一张小图：几条线，一根站在 now 的竖线。
 * @param {string} title @param {number[]} span @param {{x: number, y: number}[][]} lines
 * @param {[number, number] | null} fixed 纵轴的两端，null = 照数
 * @param {number} now @param {(y: number) => string} write
 */
function chart(title, span, lines, fixed, now, write) {
  const ys = lines.flat().map((one) => one.y);
  const [low, high] = fixed ?? [Math.min(...ys), Math.max(...ys)];
  const [left = 0, right = 1] = span;
  const x = (/** @type {number} */ v) => PAD + ((v - left) / (right - left || 1)) * (WIDE - PAD - 8);
  const y = (/** @type {number} */ v) => HIGH - 22 - ((v - low) / (high - low || 1)) * (HIGH - 34);
  const marks = [low, (low + high) / 2, high].map((v) => {
    const text = svg("text", { x: PAD - 6, y: y(v) + 4, class: "tick end" });
    text.textContent = write(v);
    return [svg("line", { x1: PAD, x2: WIDE - 8, y1: y(v), y2: y(v), class: "rule" }), text];
  }).flat();
  const ends = [left, right].map((v, i) => {
    const text = svg("text", { x: x(v), y: HIGH - 4, class: i ? "tick end" : "tick" });
    text.textContent = String(v);
    return text;
  });
  const drawn = lines.map((line, i) =>
    svg("polyline", { class: `line l${i}`, points: line.map((one) => `${x(one.x).toFixed(1)},${y(one.y).toFixed(1)}`).join(" ") }));
  const dots = lines.length === 1 ? (lines[0] ?? []).map((one) => svg("circle", { cx: x(one.x), cy: y(one.y), r: 2.6, class: "dot" })) : [];
  const cursor = svg("line", { x1: x(now), x2: x(now), y1: 8, y2: HIGH - 20, class: "cursor" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": title }, ...marks, ...ends, ...drawn, ...dots, cursor);
  const box = el("figure", {}, el("figcaption", { text: title }));
  box.append(picture);
  return box;
}
