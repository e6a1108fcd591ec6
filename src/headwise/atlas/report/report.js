// Names the head, token or cell of a picture under the pointer, and moves by arrow keys. Everything is readable without it.
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
  const text = example.querySelector(".tokens"), tokens = [...text.children], out = example.querySelector(":scope > output");
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

for (const looks of document.querySelectorAll(".looks")) {
  const boxes = JSON.parse(looks.dataset.boxes), places = JSON.parse(looks.dataset.places);
  const drawn = boxes.map(([picture, left, top, right, bottom]) => {
    const [x, y, scale] = places[picture];
    return { x: x + left * scale, y: y + top * scale, width: (right - left) * scale, height: (bottom - top) * scale };
  });
  const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
  // The nearest cell that way, where a step aside counts double.
  const beside = (at, right, down) => {
    const [x, y] = middle(drawn[at]);
    let best = at, least = Infinity;
    drawn.forEach((box, i) => {
      const [across, below] = [middle(box)[0] - x, middle(box)[1] - y];
      const ahead = across * right + below * down, aside = Math.abs(right ? below : across);
      if (ahead > 0.01 && ahead + 2 * aside < least) { least = ahead + 2 * aside; best = i; }
    });
    return best;
  };
  for (const look of looks.querySelectorAll("svg.look")) {
    const weights = JSON.parse(look.dataset.weights), cursor = look.querySelector(".cursor");
    const out = look.closest("figure").querySelector("output"), idle = out.textContent;
    let at = weights.indexOf(Math.max(...weights));
    const show = () => {
      for (const [name, value] of Object.entries(drawn[at])) cursor.setAttribute(name, value);
      cursor.setAttribute("visibility", "visible");
      const [picture, left, top, right, bottom] = boxes[at];
      out.textContent = (places.length > 1 ? "picture " + (picture + 1) + ", " : "") + left + " to " + right + " across, "
        + top + " to " + bottom + " down: weight " + shown(weights[at]);
    };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); out.textContent = idle; };
    look.addEventListener("pointermove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(look.getScreenCTM().inverse());
      const found = drawn.findLastIndex((box) => place.x >= box.x && place.x < box.x + box.width
        && place.y >= box.y && place.y < box.y + box.height);
      if (found >= 0) { at = found; show(); }
    });
    look.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    look.addEventListener("focus", () => { if (look.matches(":focus-visible")) show(); });
    look.addEventListener("blur", leave);
    look.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (by) at = beside(at, ...by);
      else if (event.key === "Home") at = 0;
      else if (event.key === "End") at = boxes.length - 1;
      else return;
      event.preventDefault();
      show();
    });
  }
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
