"use strict";

// The viewer: a cell opened large. Arrows walk through modalities and samples; a slider blends a map with its image.
const viewer = document.getElementById("viewer");
const body = viewer.querySelector(".viewer-body");
const blend = viewer.querySelector(".blend");
const slider = blend.querySelector("input");
let current = null;

const cellsOf = (row) => [...row.querySelectorAll(".cell")];

function show(cell) {
  current = cell;
  const { key, column, labeler, random } = cell.dataset;
  viewer.querySelector("h2").textContent = column;
  viewer.querySelector(".viewer-title p").textContent = labeler ? `${key} · ${labeler}` : key;
  viewer.querySelector(".viewer-bar .badge").hidden = random === undefined && !cell.querySelector(".badge.random");
  const stack = document.createElement("div");
  stack.className = "stack";
  const notes = document.createElement("div");
  notes.className = "notes";
  for (const part of cell.children) {
    if (part.matches(".open, .badge.random")) continue;
    (part.tagName === "IMG" ? stack : notes).append(part.cloneNode(true));
  }
  const image = stack.querySelector("img");
  const first = cellsOf(cell.closest("tr"))[0];
  const base = first.querySelector("img");
  const shape = (img) => img.naturalWidth / img.naturalHeight;
  const blends = Boolean(image && base && first !== cell && Math.abs(shape(base) / shape(cell.querySelector("img")) - 1) < 0.02);
  if (blends) {
    stack.prepend(base.cloneNode(true));
    blend.firstElementChild.textContent = first.dataset.column;
    blend.lastElementChild.textContent = column;
    image.style.opacity = slider.value / 100;
  }
  if (!image && base) stack.append(base.cloneNode(true)); // words and palettes are read beside their image
  blend.hidden = !blends;
  body.replaceChildren(...[stack, notes].filter((part) => part.children.length));
  if (!viewer.open) viewer.showModal();
}

function step(across, down) {
  const row = current.closest("tr");
  const rows = [...row.parentElement.children];
  const target = rows[rows.indexOf(row) + down];
  const next = target && cellsOf(target)[cellsOf(row).indexOf(current) + across];
  if (next) show(next);
}

slider.addEventListener("input", () => {
  const image = body.querySelector(".stack img:last-child");
  if (image) image.style.opacity = slider.value / 100;
});
document.addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  const stepper = event.target.closest("[data-step]");
  if (cell) show(cell);
  else if (stepper) step(Number(stepper.dataset.step), 0);
  else if (event.target === viewer || event.target.closest("[data-close]")) viewer.close();
});
viewer.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move || event.target === slider) return;
  event.preventDefault();
  step(...move);
});
viewer.addEventListener("close", () => current?.querySelector(".open").focus());

// Cells and legends that hold more than they show fade out at the bottom: all are measured before any is changed, for one layout.
const clipped = [...document.querySelectorAll(".cell, .cell .legend")].filter((cell) => cell.scrollHeight > cell.clientHeight + 1);
for (const cell of clipped) cell.classList.add("clipped");

// Plots: the legend says the values under the pointer, and the last ones when it leaves.
for (const plot of document.querySelectorAll(".plot")) {
  const canvas = plot.querySelector(".canvas");
  if (!canvas) continue;
  const ruler = canvas.querySelector(".ruler");
  const curves = [...plot.querySelectorAll(".curves li")].map((item) => {
    const points = item.dataset.points.split(" ").filter(Boolean).map((pair) => pair.split(":"));
    return { value: item.querySelector("b"), points, last: item.querySelector("b").textContent };
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 1000;
    ruler.hidden = false;
    ruler.style.left = `${Math.min(100, Math.max(0, x / 10))}%`;
    for (const { value, points } of curves) {
      let nearest = null;
      for (const point of points) if (!nearest || Math.abs(point[0] - x) < Math.abs(nearest[0] - x)) nearest = point;
      if (nearest) value.textContent = nearest[1];
    }
  });
  canvas.addEventListener("pointerleave", () => {
    ruler.hidden = true;
    for (const { value, last } of curves) value.textContent = last;
  });
}

// The menu marks the section in sight.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
}, { rootMargin: "-20% 0px -65% 0px" });
for (const section of document.querySelectorAll("section")) watcher.observe(section);
