// 造元素、方向键、数的写法。文字只从 textContent 进去；没有一处把字符串当作标记。

import { get } from "./store.js";
import { WORDS } from "./words.js";

/**
 * 词典里的一句；{name} 换成 given.name。没有这一句就是写错了名字。
 * @param {string} key @param {Record<string, string | number>} [given]
 */
export function say(key, given = {}) {
  const pair = WORDS[key];
  if (!pair) throw new Error(`words.js has no ${key}`);
  const text = pair[get().lang === "zh" ? 1 : 0];
  return text.replace(/\{(\w+)\}/g, (_, name) => String(given[name] ?? ""));
}

/**
 * say：textContent 是词典里的这一句；label、title、hint 是 aria-label、title、placeholder 的。
 * 换语言时 translate 重新写它们。其余的名字是属性，on* 是监听。
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Record<string, any>} [given] @param {...(Node | string | null)} inside
 * @returns {HTMLElementTagNameMap[T]}
 */
export function el(tag, given = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (name in SAID) made.dataset[SAID[name] ?? ""] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...inside.filter((one) => one !== null));
  translate(made);
  return made;
}

/** @type {Record<string, string>} */
const SAID = { say: "say", label: "sayLabel", title: "sayTitle", hint: "sayHint" };

/** @param {Element | Document} root 它与它里面的，照现在的语言写。 */
export function translate(root) {
  const every = [...root.querySelectorAll("[data-say],[data-say-label],[data-say-title],[data-say-hint]")];
  if (root instanceof HTMLElement) every.unshift(root);
  for (const one of every) {
    if (!(one instanceof HTMLElement)) continue;
    const { say: text, sayLabel, sayTitle, sayHint } = one.dataset;
    if (text) one.textContent = say(text);
    if (sayLabel) one.setAttribute("aria-label", say(sayLabel));
    if (sayTitle) one.title = say(sayTitle);
    if (sayHint) one.setAttribute("placeholder", say(sayHint));
  }
}

/** @param {string} id @returns {HTMLElement} */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html has no #${id}`);
  return found;
}

/**
 * 一块视图的开头：说它画的是什么、什么单位，哪个文件算它，怎样读。
 * @param {HTMLElement} root @param {string} name 词典里 name.title、name.what、name.how
 * @param {...string} sources
 */
export function opening(root, name, ...sources) {
  const files = sources.map((file) => el("code", { text: file }));
  root.append(
    el("h2", { say: `${name}.title` }),
    el("p", { class: "what", say: `${name}.what` }),
    el("details", { class: "how" },
      el("summary", { say: "how" }),
      el("p", { say: `${name}.how` }),
      el("p", { class: "source" }, el("span", { say: "source" }), " ", ...files)),
  );
}

/**
 * 一块里只有一个 Tab 停处，里面用方向键走（WAI-ARIA 的 roving tabindex）。
 * columns：一行几个，上下键用；1 = 竖排，0 = 横排（上下也当左右）。
 * @param {HTMLElement} box @param {string} selector @param {() => number} [columns]
 * @param {(item: HTMLElement) => void} [arrive]
 */
export function rove(box, selector, columns = () => 0, arrive = () => {}) {
  const items = () => /** @type {HTMLElement[]} */ ([...box.querySelectorAll(selector)]);
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const all = items();
    const active = document.activeElement;
    // 焦点在框上：方向键先走进来。
    if (active === box && event.key.startsWith("Arrow")) {
      event.preventDefault();
      (all.find((one) => one.tabIndex === 0) ?? all[0])?.focus();
      return;
    }
    const at = all.indexOf(/** @type {HTMLElement} */ (active));
    if (at < 0) return;
    const row = columns() || 1;
    /** @type {Record<string, number>} */
    const goes = {
      ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - row, ArrowDown: at + row,
      Home: 0, End: all.length - 1,
    };
    const to = goes[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all[Math.max(0, Math.min(to, all.length - 1))]?.focus();
  });
  box.addEventListener("focusin", (event) => {
    const item = /** @type {HTMLElement} */ (event.target).closest(selector);
    if (!(item instanceof HTMLElement) || !box.contains(item)) return;
    settle(box, selector, item);
    arrive(item);
  });
}

/** 只有 item 可以用 Tab 走到。 @param {HTMLElement} box @param {string} selector @param {Element} item */
export function settle(box, selector, item) {
  for (const other of box.querySelectorAll(`${selector}[tabindex="0"]`)) {
    other.setAttribute("tabindex", "-1");
  }
  item.setAttribute("tabindex", "0");
}

/** 概率写成百分数；很小的写成科学记数。 @param {number} p */
export function percent(p) {
  if (p >= 0.0995) return `${(100 * p).toFixed(1)}%`;
  if (p >= 0.0000995) return `${(100 * p).toPrecision(2)}%`;
  return p === 0 ? "0%" : `${(100 * p).toExponential(1)}%`;
}

/** 控制字符（\t、\n 除外）没有宽度：写成它的图形。 @param {string} text */
export function pictured(text) {
  const code = (/** @type {string} */ c) => (c > "~" ? 0x2421 : 0x2400 + c.charCodeAt(0));
  return text.replace(/[\0-\b\v-\x1f\x7f]/g, (c) => String.fromCharCode(code(c)));
}

/** 空白看得见的一个词元。 @param {string} text */
export function visible(text) {
  return pictured(text).replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

/** @param {number} p 0 到 1 @param {string} kind @returns {HTMLElement} 一根横条。 */
export function bar(p, kind) {
  const made = el("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  made.style.setProperty("--w", `${100 * Math.max(0, Math.min(1, p))}%`);
  return made;
}

/** @param {string} tag @param {Record<string, string | number>} given @param {...Node} inside */
export function svg(tag, given, ...inside) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, String(value));
  made.append(...inside);
  return made;
}
