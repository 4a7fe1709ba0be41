// 问 /v1/inspect：视图开着、正文停着的时候才问；同样的问题只问一次，后问的算数。

import { ApiProblem, json } from "./api.js";
import { say } from "./dom.js";
import { branch, get, modelKey, on } from "./store.js";
import { problem } from "./write.js";

/** @typedef {import("./store.js").State} State */

const TRIES = 8;
const PAUSE = 400;

/**
 * body：要问什么，或为什么现在没有可问的；draw：画回答；empty：说为什么没有画。
 * @param {string} view @param {(keyof State)[]} keys 这些变了就再看一遍
 * @param {{body: (state: State) => Record<string, any> | string, draw: (found: any) => void,
 *   empty: (message: string) => void}} does
 * @returns {() => Promise<void>} 再看一遍
 */
export function looking(view, keys, { body, draw, empty }) {
  let key = "";
  /** @type {any} */
  let found = null;

  async function look() {
    const state = get();
    if (state.view !== view || !state.model || state.writing) return;
    const asked = branch().draft === null ? body(state) : say("looking.editing");
    if (typeof asked === "string") {
      key = "";
      empty(asked);
      return;
    }
    const mine = JSON.stringify([modelKey(), asked]);
    if (mine !== key) {
      key = mine;
      found = null;
      try {
        const answer = await inspect({ model: state.model, ...asked }, () => key === mine);
        if (key !== mine) return;
        found = answer;
      } catch (error) {
        const message = problem(error);
        if (key !== mine) return;
        key = "";
        empty(message);
      }
    }
    if (found) draw(found);
  }

  on([...keys, "view", "writing", "model", "lang"], () => void look());
  return look;
}

/** @type {Promise<unknown>} */
let line = Promise.resolve();

/**
 * 一页一次一个：排到时已经没有人要了，就不问。别人在看，等一会儿再问。
 * @param {object} body @param {() => boolean} [wanted] @returns {Promise<any>} 没有问是 null
 */
export function inspect(body, wanted = () => true) {
  const turn = line.catch(() => {}).then(async () => {
    for (let left = TRIES; wanted(); left -= 1) {
      try {
        return await json("/v1/inspect", body);
      } catch (error) {
        const busy = error instanceof ApiProblem && error.code === "inspect_busy";
        if (!busy || left === 0) throw error;
        await new Promise((wake) => window.setTimeout(wake, PAUSE));
      }
    }
    return null;
  });
  line = turn;
  return turn;
}

/** 正文的前 most 个词元：因果的模型里，前缀的内部与后面有什么无关，所以截短不改变它。 @param {number} most */
export function prefix(most) {
  const ids = branch().tokens.map((one) => one.id);
  return { ids: ids.slice(0, most), cut: ids.length > most };
}

/** @param {"tokens" | "lens_tokens"} name */
export function limit(name) {
  return get().models[get().model]?.inspect_limits?.[name] ?? 64;
}
