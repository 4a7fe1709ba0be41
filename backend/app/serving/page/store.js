// 页面的全部状态，与谁在看它。改动在一个微任务里合起来说一次：一段流里来了许多词元，也只画一遍。

/**
 * 一个词元，连同模型读到它时的数；logprob、entropy 以 nat 计，rank 从 0 数。还没有打分的是 null。
 * start：写它的那次请求的提示有几个词元；人写的是 0。
 * @typedef {{id: number, text: string, bytes: number[], logprob: number | null,
 *   rank: number | null, entropy: number | null, top: Likely[], by: "you" | "model",
 *   start: number}} Token
 * @typedef {{id: number, text: string, logprob: number}} Likely
 */

/**
 * 一条枝：从 parent 的第 at 个词元处分出，tokens 是从头到尾的全部。draft 是正在改的文字，null = 没有在改。
 * @typedef {{id: number, parent: number | null, at: number, tokens: readonly Token[],
 *   draft: string | null}} Branch
 * 一本：词元号只对 model 有意义，所以撤销也回到那个模型。
 * @typedef {{model: string, branches: readonly Branch[], current: number}} Book
 */

/**
 * 采样的设置，与 /v1/completions 的字段同名、同界。
 * @typedef {{temperature: number, top_k: number, top_p: number, min_p: number,
 *   repetition_penalty: number, presence_penalty: number, frequency_penalty: number,
 *   logit_bias: Record<string, number>, seed: number | null, max_tokens: number}} Sampling
 */

/** @typedef {Record<string, any> & {context: number, vocab_size: number, rows: number}} Facts */

/**
 * tint：别的视图借正文说话（注意力的权重），0 到 1，每个词元一个。
 * @typedef {{
 *   lang: "en" | "zh", theme: "auto" | "light" | "dark", view: string,
 *   models: Record<string, Facts>, model: string,
 *   book: Book, past: readonly Book[], future: readonly Book[],
 *   focus: number, colour: "probability" | "rank" | "entropy" | "none",
 *   tint: {weights: ArrayLike<number>, from: number} | null,
 *   sampling: Sampling, writing: boolean, said: string,
 *   problem: {message: string, retry: (() => void) | null} | null,
 * }} State
 */

/** @type {Sampling} */
export const USUAL = {
  temperature: 0.8, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0,
  frequency_penalty: 0, logit_bias: {}, seed: null, max_tokens: 32,
};

/** @type {State} */
let state = {
  lang: navigator.language.startsWith("zh") ? "zh" : "en", theme: "auto", view: "branches",
  models: {}, model: "", book: draftBook("", ""),
  past: [], future: [], focus: 0, colour: "probability", tint: null,
  sampling: USUAL, writing: false, said: "", problem: null,
};

/** @type {{keys: (keyof State)[], draw: (state: State) => void}[]} */
const readers = [];
/** @type {Set<keyof State>} */
let changed = new Set();

export const get = () => state;

/** 只有一段还没有读的文字的一本。 @param {string} model @param {string} draft @returns {Book} */
function draftBook(model, draft) {
  return { model, branches: [{ id: 0, parent: null, at: 0, tokens: [], draft }], current: 0 };
}

/** 换一个模型：文字留着，号与概率都不是它的，要重新读。 @param {string} model @param {string} text */
export function adopt(model, text) {
  if (state.model) remember();
  set({ model, book: draftBook(model, text), focus: 0, tint: null });
}

/** 当前模型的文档分隔符。 */
export function separator() {
  return state.models[state.model]?.["separator"] ?? null;
}

/** 名字与指纹：服务器重开之后，同一个名字可以是另一个模型。 @param {string} [name] */
export function modelKey(name = state.model) {
  return `${name} ${state.models[name]?.["system_fingerprint"]}`;
}

/** @param {Partial<State>} patch */
export function set(patch) {
  const quiet = changed.size === 0;
  for (const key of /** @type {(keyof State)[]} */ (Object.keys(patch))) {
    if (state[key] !== patch[key]) changed.add(key);
  }
  state = { ...state, ...patch };
  if (quiet && changed.size) queueMicrotask(tell);
}

/**
 * 现在画一次，以后 keys 里有一个变了再画。
 * @param {(keyof State)[]} keys
 * @param {(state: State) => void} draw
 */
export function on(keys, draw) {
  readers.push({ keys, draw });
  draw(state);
}

function tell() {
  const now = changed;
  changed = new Set();
  for (const { keys, draw } of readers) {
    if (keys.some((key) => now.has(key))) draw(state);
  }
}

/** @param {State} [of] @returns {Branch} */
export function branch(of = state) {
  const found = of.book.branches.find((one) => one.id === of.book.current);
  if (!found) throw new Error(`no branch ${of.book.current}`);
  return found;
}

const MOST_STEPS = 200;

/** 记下现在的样子，撤销时回到这里。 */
export function remember() {
  set({ past: [...state.past, state.book].slice(-MOST_STEPS), future: [] });
}

export function undo() {
  const last = state.past.at(-1);
  if (!last) return;
  const future = [state.book, ...state.future];
  set({ book: last, model: last.model, past: state.past.slice(0, -1), future, tint: null });
  clampFocus();
}

export function redo() {
  const next = state.future[0];
  if (!next) return;
  const past = [...state.past, state.book];
  set({ book: next, model: next.model, past, future: state.future.slice(1), tint: null });
  clampFocus();
}

/** @param {Partial<Branch>} patch @param {number} [id] 哪条枝；不给就是当前的。 */
export function amend(patch, id = state.book.current) {
  const { book } = state;
  const branches = book.branches.map((one) => (one.id === id ? { ...one, ...patch } : one));
  set({ book: { ...book, branches } });
}

/**
 * 从当前的枝的第 at 个词元处分出一条，并走过去。
 * @param {number} at @param {Token} taken
 */
export function fork(at, taken) {
  const from = branch();
  const id = Math.max(...state.book.branches.map((one) => one.id)) + 1;
  const tokens = [...from.tokens.slice(0, at), taken];
  const grown = { id, parent: from.id, at, tokens, draft: null };
  set({ book: { ...state.book, branches: [...state.book.branches, grown], current: id }, focus: at });
}

/** @param {number} id 走到另一条枝。 */
export function walk(id) {
  set({ book: { ...state.book, current: id } });
  clampFocus();
}

/** @param {number} index 第几个词元；等于长度就是末尾（还没有写的那一个）。 */
export function focusOn(index) {
  set({ focus: Math.max(0, Math.min(index, branch().tokens.length)) });
}

function clampFocus() {
  focusOn(state.focus);
}
