'use strict';
// Sorting of tables, images of confusions, the attention explorer, and chart colors of the theme.

const data = JSON.parse(document.getElementById('report-data').textContent);
const byId = (id) => document.getElementById(id);

// Mark images of few pixels, whose pixels should stay visible.
for (const image of document.querySelectorAll('img.thumb')) {
  const mark = () => image.classList.toggle('tiny', Math.max(image.naturalWidth, image.naturalHeight) <= 64);
  if (image.complete) mark(); else image.addEventListener('load', mark);
}

// --- Sorting. Rows without a number stay last.

function sortTable(header) {
  const table = header.closest('table'), body = table.tBodies[0], column = header.cellIndex;
  const down = header.getAttribute('aria-sort') === 'ascending' || (header.getAttribute('aria-sort') === 'none' && column > 0);
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    if (column === 0) return (down ? -1 : 1) * key(a).localeCompare(key(b));
    const [x, y] = [Number(key(a)), Number(key(b))];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return down ? y - x : x - y;
  };
  body.append(...[...body.rows].sort(compare));
  for (const other of table.tHead.querySelectorAll('th')) other.setAttribute('aria-sort', 'none');
  header.setAttribute('aria-sort', down ? 'descending' : 'ascending');
}

for (const header of document.querySelectorAll('.sortable thead th')) {
  header.querySelector('button').addEventListener('click', () => sortTable(header));
}

// --- The images of a cell of the confusion matrix.

function showCell(button) {
  const { label, prediction, count } = button.dataset;
  const places = button.dataset.places.split(' ').filter(Boolean);
  const heading = document.createElement('h3'), list = document.createElement('ul');
  const shown = places.length < Number(count) ? `, ${places.length} shown` : '';
  heading.textContent = `${label} predicted as ${prediction}: ${count}${shown}`;
  list.className = 'cards';
  for (const place of places) {
    const item = document.createElement('li'), image = new Image(), name = document.createElement('p');
    item.className = 'card';
    name.className = 'name';
    name.dir = 'auto';
    name.textContent = data.names[place] ?? '';
    image.alt = `${label} predicted as ${prediction}`;
    image.className = 'thumb';
    image.addEventListener('load', () => image.classList.toggle('tiny', Math.max(image.naturalWidth, image.naturalHeight) <= 64));
    if (data.pictures[place]) image.src = data.pictures[place];
    item.append(image, name);
    list.append(item);
  }
  byId('cell-images').replaceChildren(heading, list);
  for (const other of document.querySelectorAll('.cell')) other.setAttribute('aria-pressed', other === button);
}

for (const button of document.querySelectorAll('.cell')) {
  button.setAttribute('aria-pressed', 'false');
  button.addEventListener('click', () => showCell(button));
}

// --- The attention explorer. Weights are uint8 [layers, heads, queries, patches].

async function decompress(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function startExplorer({ grid: [rows, columns], layers, heads, token, images }) {
  const patches = rows * columns, queries = patches + (token ? 1 : 0);
  const view = byId('attention-view'), overview = byId('attention-heads'), tile = document.createElement('canvas');
  const picture = new Image(), side = 320;
  // Pixels of a patch in the overview.
  const scale = Math.max(1, Math.floor(Math.min(64, 480 / heads, 560 / layers) / columns));
  let weights = null, query = token ? -1 : 0;  // -1 is the class token.
  tile.width = columns;
  tile.height = rows;
  overview.width = heads * (columns * scale + 3) - 3;
  overview.height = layers * (rows * scale + 3) - 3;

  function map(layer, head) {
    const start = ((layer * heads + head) * queries + query + (token ? 1 : 0)) * patches;
    return weights.subarray(start, start + patches);
  }

  function selectedMap() {
    const layer = Number(byId('attention-layer').value), head = Number(byId('attention-head').value);
    if (head >= 0) return Float32Array.from(map(layer, head));
    const mean = new Float32Array(patches);
    for (let h = 0; h < heads; h++) map(layer, h).forEach((value, i) => { mean[i] += value / heads; });
    return mean;
  }

  function lookers() {
    const layer = Number(byId('attention-layer').value) + 1, head = Number(byId('attention-head').value) + 1;
    return head ? `head ${head} of layer ${layer} looks` : `the heads of layer ${layer} look on average`;
  }

  function drawTile(context, values, color, x, y, width, height) {
    const pixels = new ImageData(columns, rows);
    values.forEach((value, i) => pixels.data.set(color(value), 4 * i));
    tile.getContext('2d').putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(tile, x, y, width, height);
  }

  function draw() {
    if (!weights) return;
    const context = view.getContext('2d'), values = selectedMap(), most = Math.max(1, ...values);
    context.imageSmoothingEnabled = picture.naturalWidth > 64;
    context.drawImage(picture, 0, 0, view.width, view.height);
    drawTile(context, values, (v) => [10, 10, 20, 225 * (1 - v / most)], 0, 0, view.width, view.height);
    if (query >= 0) {
      const [w, h] = [view.width / columns, view.height / rows];
      const [x, y] = [(query % columns) * w, Math.floor(query / columns) * h];
      context.lineWidth = 4; context.strokeStyle = '#000000'; context.strokeRect(x, y, w, h);
      context.lineWidth = 2; context.strokeStyle = '#ffd400'; context.strokeRect(x, y, w, h);
    }
    const all = overview.getContext('2d');
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        drawTile(all, map(layer, head), (v) => [v, v * 0.85, 60 + v * 0.45, 255],
          head * (columns * scale + 3), layer * (rows * scale + 3), columns * scale, rows * scale);
      }
    }
    const [layer, head] = [Number(byId('attention-layer').value), Number(byId('attention-head').value)];
    const [w, h] = [columns * scale + 3, rows * scale + 3];
    all.lineWidth = 2;
    all.strokeStyle = '#ffd400';
    all.strokeRect(head < 0 ? 1 : head * w + 1, layer * h + 1, (head < 0 ? heads * w : w) - 5, h - 5);
    const best = values.indexOf(Math.max(...values));
    const place = (i) => `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`;
    byId('attention-text').textContent =
      `From ${query < 0 ? 'the class token' : place(query)}, ${lookers()} most at ${place(best)}.`;
  }

  function moveTo(next) {
    query = next;
    draw();
  }

  async function choose(index) {
    const image = images[index];
    picture.src = image.picture;
    byId('attention-rollout').src = image.rollout;
    const [decoded] = await Promise.all([decompress(image.weights), picture.decode()]);
    weights = decoded;
    view.width = side;
    view.height = Math.round((side * picture.naturalHeight) / picture.naturalWidth);
    draw();
  }

  view.addEventListener('pointermove', (event) => {
    const box = view.getBoundingClientRect();
    const clamp = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value * count)));
    const column = clamp((event.clientX - box.left) / box.width, columns);
    moveTo(clamp((event.clientY - box.top) / box.height, rows) * columns + column);
  });
  view.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const from = Math.max(query, 0);
    const row = Math.min(rows - 1, Math.max(0, Math.floor(from / columns) + step[0]));
    moveTo(row * columns + Math.min(columns - 1, Math.max(0, (from % columns) + step[1])));
  });
  for (const id of ['attention-layer', 'attention-head']) byId(id).addEventListener('change', draw);
  byId('attention-image').addEventListener('change', (event) => choose(Number(event.target.value)));
  byId('attention-token')?.addEventListener('click', () => moveTo(-1));
  overview.addEventListener('click', (event) => {
    const box = overview.getBoundingClientRect();
    byId('attention-head').value = Math.min(heads - 1, Math.floor(((event.clientX - box.left) / box.width) * heads));
    byId('attention-layer').value = Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers));
    draw();
  });
  choose(0);
}

if (data.attention) startExplorer(data.attention);

// --- The texts of the charts have the color of the page's text, also in print.

function colorCharts() {
  const text = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
  for (const document_ of window.Bokeh?.documents ?? []) {
    for (const model of document_._all_models.values()) {
      if (model.type.endsWith('Axis')) {
        model.setv({ axis_label_text_color: text, major_label_text_color: text, axis_line_color: text, major_tick_line_color: text, minor_tick_line_color: null });
      } else if (model.type === 'Legend') {
        model.setv({ label_text_color: text });
      }
    }
  }
}

if (window.Bokeh) {
  for (const query of ['(prefers-color-scheme: dark)', 'print']) matchMedia(query).addEventListener('change', colorCharts);
  const wait = setInterval(() => {
    if (!window.Bokeh.documents.length) return;
    clearInterval(wait);
    colorCharts();
  }, 50);
}
