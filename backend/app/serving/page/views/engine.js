// 引擎：哪些行在忙、哪些还热着，一秒多少词元，多少是借来的、猜中的。一秒问一次，只在看着的时候。

import { json, text } from "../api.js";
import { byId, el, opening, say } from "../dom.js";
import { get, on } from "../store.js";
import { problem } from "../write.js";

const EVERY = 1000;

/** Prometheus 的文字 -> 名字 -> 这个模型的数。 @param {string} page @param {string} model */
export function metrics(page, model) {
  /** @type {Record<string, number>} */
  const found = {};
  for (const line of page.split("\n")) {
    const match = /^gpt2_(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name = "", labels = "", value] = match;
    if (labels.includes('model="') && !labels.includes(`model="${model}"`)) continue;
    found[name] = (found[name] ?? 0) + Number(value);
  }
  return found;
}

export function engine() {
  const root = byId("view-engine");
  opening(root, "engine", "backend/app/serving/engine.py", "backend/app/serving/rows.py");
  const rows = el("ul", { id: "rows", class: "slots", label: "engine.rows", role: "list" });
  const facts = el("dl", { id: "engine-facts", class: "figures" });
  const trouble = el("p", { class: "about", role: "status" });
  root.append(trouble, facts, el("h3", { say: "engine.rows" }), rows);

  /** @type {{at: number, found: Record<string, number>} | null} */
  let before = null;

  async function look() {
    const { view, model } = get();
    if (view !== "engine" || !model || document.hidden) return;
    try {
      const [slots, page] = await Promise.all([json("/slots"), text("/metrics")]);
      const now = { at: performance.now(), found: metrics(page, model) };
      trouble.textContent = "";
      draw(slots.filter((/** @type {any} */ one) => one.model === model), now);
      before = now;
    } catch (error) {
      trouble.textContent = problem(error);
    }
  }

  /** @param {any[]} slots @param {{at: number, found: Record<string, number>}} now */
  function draw(slots, now) {
    const context = get().models[get().model]?.context ?? 1;
    rows.replaceChildren(...slots.map((one) => {
      const kind = one.busy ? "busy" : one.tokens ? "warm" : "free";
      const fill = el("span", { class: "fill", "aria-hidden": "true" });
      fill.style.setProperty("--w", `${(100 * one.tokens) / context}%`);
      return el("li", { class: `slot ${kind}` }, fill,
        el("span", { text: `${one.row + 1}` }),
        el("span", { text: say(`engine.${kind}`) }),
        el("span", { class: "number", text: say("engine.tokens", { n: one.tokens, context }) }));
    }));
    const x = now.found;
    const seconds = before ? (now.at - before.at) / 1000 : 0;
    /** @param {string} name */
    const rate = (name) => (before && seconds ? ((x[name] ?? 0) - (before.found[name] ?? 0)) / seconds : 0);
    const share = (/** @type {string} */ part, /** @type {string} */ whole) =>
      x[whole] ? `${((100 * (x[part] ?? 0)) / x[whole]).toFixed(1)}%` : "–";
    const steps = x["engine_steps_total"] ?? 0;
    const ms = steps ? `${((1000 * (x["engine_step_seconds_total"] ?? 0)) / steps).toFixed(1)} ms` : "–";
    /** @type {[string, string][]} */
    const figures = [
      ["rate", `${rate("generation_tokens_total").toFixed(1)}/s`],
      ["running", String(x["num_requests_running"] ?? 0)],
      ["waiting", String(x["num_requests_waiting"] ?? 0)],
      ["made", String(x["generation_tokens_total"] ?? 0)],
      ["cached", share("prefix_cache_hits_total", "prefix_cache_queries_total")],
      ["drafts", share("spec_decode_accepted_tokens_total", "spec_decode_draft_tokens_total")],
      ["step", ms],
      ["kv", `${(100 * (x["kv_cache_usage_ratio"] ?? 0)).toFixed(0)}%`],
    ];
    facts.replaceChildren(...figures.map(([name, value]) =>
      el("div", { "data-name": name }, el("dt", { say: `engine.${name}` }), el("dd", { text: value }))));
  }

  on(["view", "model", "models", "lang"], () => void look());
  window.setInterval(() => void look(), EVERY);
}
