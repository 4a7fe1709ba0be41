// 别的可能：一个词元那里最可能的十个；选一个就长出一条枝。枝都留着，可以走回去。

import { bar, byId, el, opening, percent, rove, say, settle, visible } from "../dom.js";
import { branch, focusOn, get, on, walk } from "../store.js";
import { stop, take, textOf } from "../write.js";

/** @typedef {import("../store.js").State} State */
/** @typedef {import("../store.js").Branch} Branch */

export function branches() {
  const root = byId("view-branches");
  opening(root, "branches", "backend/app/serving/draws.py", "backend/app/serving/rows.py");
  const about = el("p", { id: "about", class: "about" });
  const list = el("ol", { id: "likely", role: "listbox", label: "likely.label", class: "likely" });
  const tree = el("ul", { id: "tree", role: "tree", label: "tree.label", class: "tree" });
  root.append(about, list, el("h3", { say: "tree.title" }), tree);

  rove(list, ".one", () => 1);
  list.addEventListener("keydown", (event) => {
    const { focus } = get();
    if (event.key === "Enter") pick(event.target);
    else if (event.key === "ArrowLeft") focusOn(focus - 1);
    else if (event.key === "ArrowRight") focusOn(focus + 1);
  });
  list.addEventListener("click", (event) => pick(event.target));
  on(["book", "focus", "lang", "writing"], (state) => likely(state, about, list));

  rove(tree, ".twig", () => 1);
  const choose = (/** @type {Event} */ event) => {
    const item = /** @type {HTMLElement} */ (event.target).closest(".twig");
    if (item instanceof HTMLElement) void stop().then(() => walk(Number(item.dataset.id)));
  };
  tree.addEventListener("click", choose);
  tree.addEventListener("keydown", (event) => event.key === "Enter" && choose(event));
  on(["book", "lang"], (state) => twigs(state, tree));
}

/** @param {EventTarget | null} target */
function pick(target) {
  const item = /** @type {HTMLElement} */ (target).closest(".one");
  if (!(item instanceof HTMLElement)) return;
  const at = get().focus;
  const token = branch().tokens[at];
  const other = token?.top.find((one) => one.id === Number(item.dataset.id));
  if (token && other && other.id !== token.id) void take(at, other);
}

/** @param {State} state @param {HTMLElement} about @param {HTMLElement} list */
function likely(state, about, list) {
  const token = branch(state).draft === null ? branch(state).tokens[state.focus] : undefined;
  if (!token || !token.top.length) {
    about.textContent = say(token ? "likely.first" : "reading.none");
    list.replaceChildren();
    return;
  }
  about.textContent = say("likely.about", {
    at: state.focus + 1, name: visible(token.text), p: percent(Math.exp(token.logprob ?? 0)),
    rank: (token.rank ?? 0) + 1, h: (token.entropy ?? 0).toFixed(2),
  });
  const held = list.contains(document.activeElement);
  const shown = [...token.top];
  // 选中的不在前十里，也列出来，好看它差多远。
  if (shown.every((one) => one.id !== token.id)) {
    shown.push({ id: token.id, text: token.text, logprob: token.logprob ?? 0 });
  }
  const most = Math.exp(shown[0]?.logprob ?? 0);
  const items = shown.map((one, i) => {
    const p = Math.exp(one.logprob);
    const chosen = one.id === token.id;
    const rank = i < token.top.length ? i : token.rank ?? i;
    const item = el("li",
      { class: chosen ? "one chosen" : "one", role: "option", tabindex: "-1", "data-id": one.id,
        "data-p": p, "aria-selected": chosen },
      el("span", { class: "rank", text: String(rank + 1) }),
      el("span", { class: "word", text: visible(one.text) }),
      bar(p / most, "raw"),
      el("span", { class: "number", text: percent(p) }));
    const key = chosen ? "likely.chosen" : "likely.one";
    item.setAttribute("aria-label", say(key, { rank: rank + 1, name: visible(one.text), p: percent(p) }));
    return item;
  });
  list.replaceChildren(...items);
  const first = items[0];
  if (first) settle(list, ".one", first);
  if (held) first?.focus();
}

/** @param {State} state @param {HTMLElement} tree */
function twigs(state, tree) {
  const { branches: all, current } = state.book;
  const held = tree.contains(document.activeElement);
  /** @type {HTMLElement[]} */
  const items = [];
  /** @param {Branch} one @param {number} depth */
  const grow = (one, depth) => {
    const parent = all.find((other) => other.id === one.parent);
    const tail = visible(textOf(one.tokens.slice(one.at, one.at + 12))) || "…";
    const made = one.tokens.length - one.at;
    const text = parent
      ? say("twig", { at: one.at + 1, old: visible(parent.tokens[one.at]?.text ?? ""), n: made })
      : say("twig.root", { n: made });
    const item = el("li",
      { class: one.id === current ? "twig current" : "twig", role: "treeitem", tabindex: "-1",
        "data-id": one.id, "aria-level": depth + 1, "aria-selected": one.id === current },
      el("span", { class: "tail", text: tail }), el("span", { class: "fine", text }));
    item.style.setProperty("--depth", String(Math.min(depth, 8)));
    items.push(item);
    for (const child of all.filter((other) => other.parent === one.id)) grow(child, depth + 1);
  };
  for (const one of all.filter((other) => other.parent === null)) grow(one, 0);
  tree.replaceChildren(...items);
  const here = items.find((item) => item.classList.contains("current"));
  if (here) settle(tree, ".twig", here);
  if (held) here?.focus();
}
