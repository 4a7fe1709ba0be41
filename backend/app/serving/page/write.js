// 写：打分、接着写、停、换一个词元。一次只有一个请求；停就是断开，服务器在两步之间放掉那一行。

import { ApiProblem, events, json } from "./api.js";
import { say } from "./dom.js";
import { adopt, amend, branch, fork, get, modelKey, redo, remember, separator, set, undo } from "./store.js";

/** @typedef {import("./store.js").Token} Token */
/** @typedef {import("./store.js").Likely} Likely */

const DETAILS = 10;

let control = new AbortController();
/** @type {Promise<void>} */
let finished = Promise.resolve();

/** 枝上的文字；文档的分隔符不是文字。 @param {readonly Token[]} tokens */
export function textOf(tokens) {
  const bytes = tokens.filter((one) => one.id !== separator()).flatMap((one) => one.bytes);
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
}

/** 接着写至多 most 个；0 = 只给已有的文字打分。 @param {number} most */
export function go(most) {
  if (get().writing) return finished;
  set({ writing: true, problem: null, said: "" });
  control = new AbortController();
  finished = run(most)
    .catch((error) => fail(error, () => go(most)))
    .finally(() => set({ writing: false }));
  return finished;
}

/** 等到真的停了。 */
export async function stop() {
  control.abort();
  await finished;
}

/** 现在的文字：正在改的，或词元写出的。 */
export function textNow() {
  return branch().draft ?? textOf(branch().tokens);
}

/** @param {string} model */
export async function change(model) {
  await stop();
  adopt(model, textNow());
}

export async function stepBack() {
  await stop();
  undo();
}

export async function stepForward() {
  await stop();
  redo();
}

/** 在第 at 处换成 other，成为一条新的枝，接着写。 @param {number} at @param {Likely} other */
export async function take(at, other) {
  await stop();
  const old = branch().tokens[at];
  try {
    const [piece] = await pieces([other.id]);
    if (!old || !piece) return;
    const rank = old.top.findIndex((one) => one.id === other.id);
    remember();
    // 同一个位置、同一个分布：只有选中的变了，不必再问。
    fork(at, { ...old, ...piece, logprob: other.logprob, rank, by: "you" });
  } catch (error) {
    fail(error, () => take(at, other));
    return;
  }
  await go(get().sampling.max_tokens);
}

/** @type {Map<string, Map<number, {id: number, text: string, bytes: number[]}>>} */
const known = new Map();

/** 号 -> 它的文字与字节；问过的记着。 @param {number[]} ids */
export async function pieces(ids) {
  const model = get().model;
  const mine = known.get(modelKey()) ?? new Map();
  known.set(modelKey(), mine);
  const missing = ids.filter((id) => !mine.has(id));
  if (missing.length) {
    const found = await json("/detokenize", { model, tokens: missing, with_pieces: true });
    for (const one of found.pieces) mine.set(one.id, one);
  }
  return ids.map((id) => mine.get(id));
}

/** @param {number} most */
async function run(most) {
  const mine = branch();
  const tokens = await settled(mine);
  const context = get().models[get().model]?.context ?? 0;
  if (tokens.length > context) {
    throw new ApiProblem(400, "too_long", say("error.too_long", { n: tokens.length, context }));
  }
  const count = Math.min(most, context - tokens.length);
  const scoring = tokens.some((one, i) => i > 0 && one.logprob === null);
  if (mine.draft !== null || count) remember();
  amend({ tokens, draft: null });
  if (get().focus >= mine.tokens.length) set({ focus: tokens.length });
  const full = most > 0 && count < most;
  if (count || scoring) await receive(mine.id, tokens, count, scoring, full);
  else if (full) throw new ApiProblem(400, "full", say("error.full", { context }));
}

/** 现在的词元：正在改的文字先编码，没有改动的就还是原来那些。 @param {import("./store.js").Branch} mine @returns {Promise<readonly Token[]>} */
async function settled(mine) {
  if (mine.draft === null && mine.tokens.length) return mine.tokens;
  if (mine.draft && mine.draft === textOf(mine.tokens)) return mine.tokens;
  const body = { model: get().model, prompt: mine.draft ?? "", add_special_tokens: true };
  const found = await json("/tokenize", { ...body, with_pieces: true }, control.signal);
  if (found.count > found.pieces.length) {
    const given = { n: found.count, context: found.max_model_len };
    throw new ApiProblem(400, "too_long", say("error.too_long", given));
  }
  const unscored = { logprob: null, rank: null, entropy: null, top: [], by: "you", start: 0 };
  return found.pieces.map((/** @type {object} */ piece) => ({ ...piece, ...unscored }));
}

/**
 * @param {number} id 写进哪条枝 @param {readonly Token[]} start @param {number} count
 * @param {boolean} scoring 已有的也要分数 @param {boolean} full 上下文放不下要的那么多
 */
async function receive(id, start, count, scoring, full) {
  const { model, sampling } = get();
  const { seed, logit_bias, max_tokens: _, ...knobs } = sampling;
  const body = {
    model, prompt: start.map((one) => one.id), max_tokens: count, echo: scoring, details: DETAILS,
    stream: true, ...knobs, ...(Object.keys(logit_bias).length ? { logit_bias } : {}),
    ...(seed === null ? {} : { seed }),
  };
  let tokens = start;
  let first = true;
  let why = "";
  for await (const event of events("/v1/completions", body, control.signal)) {
    if (event === "[DONE]") {
      const ended = why === "stop" ? "said.stop" : full ? "said.full" : "said.length";
      set({ said: say("said.end", { n: tokens.length - start.length, why: say(ended) }) });
      if (full && why === "length") throw new ApiProblem(400, "full", say("error.cut"));
      return;
    }
    const key = `${model} ${event.system_fingerprint}`;
    if (key !== modelKey()) throw new ApiProblem(409, "changed", say("error.changed"));
    const [choice] = event.choices;
    const details = choice.details.slice();
    if (first && scoring) {
      tokens = start.map((old) => ({ ...details.shift(), by: old.by, start: old.start }));
    }
    first = false;
    const grown = details.map((/** @type {object} */ one) => ({ ...one, by: "model", start: start.length }));
    const followed = get().focus === tokens.length && get().book.current === id;
    tokens = [...tokens, ...grown];
    why = choice.finish_reason ?? why;
    amend({ tokens }, id);
    if (followed) set({ focus: tokens.length });
  }
  throw new ApiProblem(0, "offline", "the stream ended half-way");
}

/** @param {unknown} error @param {() => void} again */
export function fail(error, again) {
  if (error instanceof DOMException && error.name === "AbortError") {
    set({ said: say("said.stopped") });
    return;
  }
  if (!(error instanceof ApiProblem)) throw error;
  set({ problem: explained(error, again) });
}

// 服务器的话是英文的；常见的几种页面自己说，再附上原话。
const TOLD = new Set([
  "offline", "invalid_api_key", "queue_full", "shutting_down", "deadline_exceeded",
  "internal_error", "inspect_off", "model_not_found", "inspect_busy",
]);
const OWN = new Set(["full", "too_long"]);

/** 出了什么错，一句话。 @param {unknown} error */
export function problem(error) {
  if (!(error instanceof ApiProblem)) throw error;
  return explained(error, () => {}).message;
}

/** @param {ApiProblem} error @param {() => void} again */
export function explained(error, again) {
  const said = TOLD.has(error.code);
  const detail = error.code === "offline" ? "" : ` (${error.message})`;
  const message = said ? say(`error.${error.code}`) + detail : error.message;
  return { message, retry: OWN.has(error.code) ? null : again };
}
