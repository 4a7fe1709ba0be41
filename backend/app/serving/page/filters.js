// 采样的数学，与 app/generation/sampling.py、app/serving/draws.py 相同的次序：
// 偏置、出现与频率惩罚、重复惩罚、温度、top-k、top-p、min-p。纯函数，双精度；被排除的是 -Infinity。

/** @typedef {import("./store.js").Sampling} Sampling */
/** @typedef {Float64Array<ArrayBuffer>} Numbers 每个词元号一个 */

/** @param {ArrayLike<number>} logits @param {Record<string, number>} bias @returns {Numbers} */
export function biased(logits, bias) {
  const out = Float64Array.from(logits);
  for (const [id, value] of Object.entries(bias)) {
    const at = Number(id);
    out[at] = (out[at] ?? 0) + value;
  }
  return out;
}

/** 写过的词元，不管写过几次减一份 presence，每次再减一份 frequency。 @param {Numbers} logits @param {Map<number, number>} counts @param {number} presence @param {number} frequency */
export function penalised(logits, counts, presence, frequency) {
  const out = logits.slice();
  for (const [id, count] of counts) out[id] = (out[id] ?? 0) - (presence + frequency * count);
  return out;
}

/** 见过的（提示也算）：正的除以 penalty，负的乘（CTRL, arXiv:1909.05858）。 @param {Numbers} logits @param {Iterable<number>} seen @param {number} penalty */
export function repeated(logits, seen, penalty) {
  const out = logits.slice();
  for (const id of new Set(seen)) {
    const value = out[id] ?? 0;
    out[id] = value < 0 ? value * penalty : value / penalty;
  }
  return out;
}

/** 留下第 k 大及以上的；与第 k 大相等的都留下。 @param {Numbers} logits @param {number} k */
export function topK(logits, k) {
  if (k <= 0 || k >= logits.length) return logits;
  const kth = logits.slice().sort()[logits.length - k] ?? -Infinity;
  return logits.map((x) => (x < kth ? -Infinity : x));
}

/** 概率和达到 p 的最小集合，至少一个（arXiv:1904.09751）。 @param {Numbers} logits @param {number} p */
export function topP(logits, p) {
  if (p >= 1) return logits;
  const probs = softmax(logits);
  const order = ranked(probs);
  const out = new Float64Array(logits.length).fill(-Infinity);
  let before = 0;
  for (const id of order) {
    if (before >= p) break;
    out[id] = logits[id] ?? 0;
    before += probs[id] ?? 0;
  }
  return out;
}

/** 去掉概率不到最大者 p 倍的（arXiv:2407.01082）。 @param {Numbers} logits @param {number} p */
export function minP(logits, p) {
  if (p <= 0) return logits;
  const floor = largest(logits) + Math.log(p);
  return logits.map((x) => (x < floor ? -Infinity : x));
}

/** @param {Numbers} logits @param {number} temperature 0 = 只留最大的那一个 */
export function heated(logits, temperature) {
  if (temperature > 0) return logits.map((x) => x / temperature);
  const best = logits.indexOf(largest(logits));
  return logits.map((x, id) => (id === best ? x : -Infinity));
}

/** @param {ArrayLike<number>} logits @returns {Numbers} */
export function softmax(logits) {
  const top = largest(logits);
  const out = Float64Array.from(logits, (x) => Math.exp(x - top));
  const total = out.reduce((a, b) => a + b, 0);
  return out.map((x) => x / total);
}

/** 以 nat 计。 @param {Numbers} probs */
export function entropy(probs) {
  return probs.reduce((sum, p) => (p > 0 ? sum - p * Math.log(p) : sum), 0);
}

/** 从最可能的到最不可能的词元号；一样可能的，号小的在前。 @param {Numbers} probs @returns {number[]} */
export function ranked(probs) {
  const order = Array.from(probs.keys());
  return order.sort((a, b) => (probs[b] ?? 0) - (probs[a] ?? 0) || a - b);
}

/** @param {ArrayLike<number>} values */
function largest(values) {
  let best = -Infinity;
  for (let i = 0; i < values.length; i += 1) best = Math.max(best, values[i] ?? -Infinity);
  return best;
}

/**
 * 一步步走完，每一步之后的 logits。top_p = 0 就是只要最可能的，与服务器相同。
 * @param {ArrayLike<number>} logits @param {Sampling} config
 * @param {readonly number[]} prompt @param {readonly number[]} made 只有写的才算出现与频率惩罚
 * @returns {{name: string, logits: Numbers}[]}
 */
export function stages(logits, config, prompt, made) {
  /** @type {Map<number, number>} */
  const counts = new Map();
  for (const id of made) counts.set(id, (counts.get(id) ?? 0) + 1);
  const greedy = config.temperature === 0 || config.top_p === 0;
  const found = [{ name: "model", logits: Float64Array.from(logits) }];
  /** @param {string} name @param {(x: Numbers) => Numbers} act */
  const step = (name, act) => {
    found.push({ name, logits: act(found.at(-1)?.logits ?? new Float64Array()) });
  };
  const { presence_penalty, frequency_penalty, repetition_penalty } = config;
  step("bias", (x) => biased(x, config.logit_bias));
  step("presence", (x) => penalised(x, counts, presence_penalty, frequency_penalty));
  step("repetition", (x) => repeated(x, [...prompt, ...made], repetition_penalty));
  step("temperature", (x) => heated(x, greedy ? 0 : config.temperature));
  step("top_k", (x) => (greedy ? x : topK(x, config.top_k)));
  step("top_p", (x) => (greedy ? x : topP(x, config.top_p)));
  step("min_p", (x) => (greedy ? x : minP(x, config.min_p)));
  return found;
}
