// What every page has: the numbers, both languages, the theme, and how an SVG is made.
const DATA = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;

function remembered(key) { try { return localStorage.getItem(key); } catch { return null; } }
function remember(key, value) { try { localStorage.setItem(key, value); } catch { /* a file may have no storage */ } }

function language() { return root.dataset.lang; }
/** A text: [English, Chinese], or one, whose Chinese the catalogue may have. */
function T(words) { return Array.isArray(words) ? words[language() === "zh" ? 1 : 0] : N(String(words)); }

const redraw = [];  // called when the language or the width has changed

function setLanguage(lang) {
  root.dataset.lang = lang;
  root.lang = lang === "zh" ? "zh-CN" : "en";
  document.getElementById("language").textContent = lang === "zh" ? "English" : "中文";
  remember("language", lang);
  redraw.forEach((draw) => draw());
}
document.getElementById("language").onclick = () => setLanguage(language() === "zh" ? "en" : "zh");

function setTheme(theme) { root.dataset.theme = theme; remember("theme", theme); }
document.getElementById("theme").onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme:dark)").matches;
  setTheme(dark ? "light" : "dark");
};
if (remembered("theme")) root.dataset.theme = remembered("theme");

/** An HTML element: attributes, then children or texts. */
function h(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node[key] = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
/** The same of SVG. */
function s(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
/** A number as the tables write it. */
function num(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const text = value.toPrecision(4);
  return text.includes("e") ? text : String(Number(text));
}
/** The width of a text in 12 px, about: a Chinese character is as wide as two letters. */
function textWidth(text) {
  let width = 0;
  for (const c of text) width += c.codePointAt(0) > 0x2e7f ? 12.5 : 7.2;
  return width;
}
function legend(entries) {
  return h("div", { class: "legend" }, ...entries.map(([colour, text, kind]) =>
    h("span", {}, h("i", kind ? { class: kind } : { style: `background:${colour}` }), text)));
}
/** A name of a bar, a line, a column: in Chinese where the catalogue has it. */
const N = (name) => (language() === "zh" && DATA.words[name]) || name;
const series = (i) => `var(--s${i % 8})`;
