// Names the head or token under the pointer, and moves by arrow keys. Everything is readable without it.
"use strict";

function shown(value) {
  if (value === null || value === undefined) return "no value";
  const text = Math.abs(value) >= 1e-4 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  return text.replace("-", "\u2212");
}

function arrows(event, width) {
  return { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width, Home: -Infinity, End: Infinity }[event.key];
}

for (const map of document.querySelectorAll("svg.map")) {
  const cell = Number(map.dataset.cell), left = Number(map.dataset.left), top = Number(map.dataset.top);
  const rows = JSON.parse(map.dataset.rows), values = JSON.parse(map.dataset.values);
  const cursor = map.querySelector(".cursor"), out = map.closest("figure").querySelector("output");
  const idle = out.textContent;
  let row = 0, head = 0;
  const show = () => {
    cursor.setAttribute("x", head * cell - 0.5);
    cursor.setAttribute("y", row * cell - 0.5);
    cursor.setAttribute("visibility", "visible");
    out.textContent = rows[row] + "H" + head + ": " + shown(values[row][head]) + " (n = " + map.closest("figure").dataset.n + ")";
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); out.textContent = idle; };
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect(), zoom = map.viewBox.baseVal.width / box.width;
    const y = Math.floor(((event.clientY - box.top) * zoom - top) / cell);
    const x = Math.floor(((event.clientX - box.left) * zoom - left) / cell);
    if (values[y] && x >= 0 && x < values[y].length) { row = y; head = x; show(); }
  });
  map.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) show(); });
  map.addEventListener("blur", leave);
  map.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    row = Math.min(values.length - 1, Math.max(0, row + by[0]));
    head = Math.min(values[row].length - 1, Math.max(0, head + by[1]));
    show();
  });
}

const BOUNDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8];

for (const example of document.querySelectorAll(".example")) {
  const text = example.querySelector(".tokens"), tokens = [...text.children], out = example.querySelector("output");
  const buttons = [...example.querySelectorAll("button")];
  let weights = [], name = "", at = 0;
  const tell = (place) => {
    tokens[at].classList.remove("at");
    at = place;
    tokens[at].classList.add("at");
    out.textContent = name + " \u2192 token " + at + " \u201c" + tokens[at].textContent + "\u201d: weight " + shown(weights[at]);
  };
  const choose = (button) => {
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    weights = JSON.parse(button.dataset.weights);
    name = button.dataset.head;
    tokens.forEach((token, i) => {
      token.className = "t c" + BOUNDS.filter((bound) => weights[i] >= bound).length;
    });
    let most = 0;
    weights.forEach((weight, i) => { if (weight > weights[most]) most = i; });
    tell(most);
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  text.addEventListener("pointerover", (event) => {
    const place = tokens.indexOf(event.target);
    if (place >= 0) tell(place);
  });
  text.addEventListener("click", (event) => {
    const place = tokens.indexOf(event.target);
    if (place >= 0) tell(place);
  });
  text.addEventListener("keydown", (event) => {
    const by = arrows(event, 1);
    if (by === undefined) return;
    event.preventDefault();
    tell(Math.min(tokens.length - 1, Math.max(0, at + by)));
  });
  if (buttons.length) choose(buttons[0]);
}

for (const button of document.querySelectorAll("button.copy")) {
  const text = document.getElementById(button.dataset.copies);
  button.hidden = !text;
  button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(text);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    let copied = false;
    try { copied = document.execCommand("copy"); } catch (error) { copied = false; }
    button.textContent = copied ? "Copied" : "Selected";
  });
}
