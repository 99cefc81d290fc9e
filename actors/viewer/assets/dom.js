"use strict";
// What all parts of the page use. Text from a run only ever becomes text: nothing here parses HTML.

const byId = (id) => document.getElementById(id);

// An element with these attributes (`on...` are listeners) and children, elements or texts; null is left out.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null).map((c) => (c instanceof Node ? c : String(c))));
  return element;
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 1) return String(Number(value.toPrecision(4)));
  return size >= 0.001 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

// A choice that outlives the page, where the browser allows that.
function remember(name, value) {
  try {
    localStorage.setItem(`bascule ${name}`, JSON.stringify(value));
  } catch {}
}

function remembered(name) {
  try {
    return JSON.parse(localStorage.getItem(`bascule ${name}`));
  } catch {
    return null;
  }
}

// Replaces the options of a select after its first, keeping what is chosen.
function offer(select, values) {
  const chosen = select.value;
  const others = values.map((value) => make("option", { value }, value || "(none)"));
  select.replaceChildren(select.options[0], ...others);
  select.value = values.includes(chosen) ? chosen : "";
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");

// Follows the system until something else is chosen; `changed` is called when the colours are others.
function followTheme(changed) {
  const select = byId("theme");
  const apply = () => {
    const dark = select.value === "dark" || (select.value === "auto" && systemDark.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    changed();
  };
  select.value = remembered("theme") ?? "auto";
  select.addEventListener("change", () => {
    remember("theme", select.value);
    apply();
  });
  systemDark.addEventListener("change", apply);
  apply();
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
