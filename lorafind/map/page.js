"use strict";
// All text from the data reaches the page by textContent alone; Plotly gets numbers, and the names
// of hulls without a character that it would interpret.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const n = data.name.length;
  const $ = (id) => document.getElementById(id);
  const plot = $("plot"), tip = $("tip"), status = $("status"), search = $("search"),
    results = $("results"), detail = $("detail");
  const COLOURS = ["#3b6fd4", "#e07b1a", "#2a9d5b", "#cf3f46", "#8f5bc4", "#8a5a3c", "#d95fa8",
    "#24406e", "#a9a11c", "#17a3b8"];
  const FLAT = ["circle", "square", "diamond", "triangle-up", "cross", "x"];
  const DEEP = ["circle", "square", "diamond", "cross", "x", "circle-open"];
  const GLYPHS = {
    "circle": "M8 2a6 6 0 1 0 .01 0z", "square": "M3 3h10v10H3z", "diamond": "M8 1l6 7-6 7-6-7z",
    "triangle-up": "M8 2l7 12H1z", "cross": "M6 1h4v5h5v4h-5v5H6v-5H1V6h5z",
    "x": "M3 1l5 5 5-5 2 2-5 5 5 5-2 2-5-5-5 5-2-2 5-5-5-5z",
  };
  const GREY = "#9aa1ad";
  const SIZE = n <= 300 ? 9 : n <= 2000 ? 6 : 4;
  const haystack = data.name.map((name, i) =>
    [name, data.path[i], ...data.words[i]].join("\n").toLowerCase());
  const first = Math.max(0, data.colourings.findIndex((one) => one.key === data.colour));
  const state = { colour: first, view: 2, hidden: new Set(), chosen: -1, cursor: -1, found: [],
    active: -1 };

  const element = (kind, text, parent) => {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const now = () => data.colourings[state.colour];
  const places = () => (state.view === 2 ? data.flat : data.deep);
  const isGrey = (c) => c >= now().names.length - now().grey;
  const colourOf = (c) => (isGrey(c) ? GREY : COLOURS[c % COLOURS.length]);
  const symbolOf = (c, set) => (isGrey(c) ? "circle" : set[Math.floor(c / COLOURS.length) % 6]);
  const visible = (i) => !state.hidden.has(now().of[i]);
  const title = (c) => now().names[c] || (now().key === "group" ? "in no group" : "unknown");
  const pick = (columns, list) => columns.map((column) => list.map((i) => column[i]));

  // ---------------------------------------------------------------- what is drawn

  function points(columns, list, extra) {
    const [x, y, z] = pick(columns, list);
    const made = { x, y, customdata: list, hoverinfo: "none", showlegend: false, ...extra };
    return state.view === 3 ? { ...made, z, type: "scatter3d" } : { ...made, type: "scattergl" };
  }

  function traces() {
    const columns = places(), colouring = now(), made = [];
    const members = colouring.names.map(() => []);
    colouring.of.forEach((c, i) => members[c].push(i));
    const set = state.view === 2 ? FLAT : DEEP;
    const areas = around();
    if (areas) {
      areas.shapes.forEach((shape, c) => {
        if (areas !== colouring) made.push(...hull(columns, shape, ink("--soft")));
        else if (!state.hidden.has(c)) made.push(...hull(columns, shape, colourOf(c)));
      });
    }
    members.forEach((list, c) => {
      if (state.hidden.has(c) || !list.length) return;
      const shape = colouring.shapes[c];
      made.push(points(columns, list, { mode: "markers", marker: {
        color: colourOf(c), symbol: symbolOf(c, set), size: state.view === 3 ? SIZE * 0.5 : SIZE,
        opacity: n > 2000 ? 0.7 : 0.9,
        line: { width: n > 2000 || state.view === 3 ? 0 : 0.5, color: ink("--paper") } } }));
      if (shape && $("stars").checked) made.push(...star(columns, shape, list, c));
    });
    if (state.found.length) {
      made.push(ring(columns, state.found.filter(visible), ink("--ink"), SIZE + 6, 1.5));
    }
    made.push(...chosen(columns));
    return made;
  }

  function ring(columns, list, color, size, width) {
    // 3D markers have no ring of their own width: an open circle stands for it.
    return points(columns, list, { mode: "markers", hoverinfo: "skip", marker: {
      color: state.view === 3 ? color : "rgba(0,0,0,0)", size,
      symbol: state.view === 3 ? "circle-open" : "circle", line: { color, width } } });
  }

  // The colouring whose categories get hulls, if any.
  function around() {
    const wanted = $("hulls").value;
    if (wanted === "colour") return now();
    return data.colourings.find((one) => one.key === wanted);
  }

  // The name of a hull that is not told by a colour, at its top.
  function names() {
    const areas = around();
    if (!areas || areas === now() || state.view === 3) return [];
    const [x, y] = data.flat, made = [];
    areas.shapes.forEach((shape, c) => {
      if (!shape.outline.length) return;
      const top = shape.outline.reduce((a, b) => (y[b] > y[a] ? b : a));
      made.push({ x: x[top], y: y[top], text: plain(areas.names[c]), showarrow: false, yshift: 9,
        captureevents: false, font: { color: ink("--soft") } });
    });
    return made;
  }

  // Plotly reads a little HTML and TeX in its texts: nothing of it is left here.
  const plain = (text) => text.replace(/[&<>$]/g, (c) => ({ "&": "＆", "<": "‹", ">": "›",
    "$": "＄" })[c]);

  function hull(columns, shape, color) {
    if (state.view === 3) {
      if (!shape.faces.length) return [];
      const corner = [...new Set(shape.faces.flat())], at = new Map(corner.map((i, k) => [i, k]));
      const [x, y, z] = pick(columns, corner);
      const [i, j, k] = [0, 1, 2].map((e) => shape.faces.map((face) => at.get(face[e])));
      return [{ type: "mesh3d", x, y, z, i, j, k, color, opacity: 0.12, hoverinfo: "skip",
        showlegend: false }];
    }
    if (!shape.outline.length) return [];
    const [x, y] = pick(columns, [...shape.outline, shape.outline[0]]);
    return [{ type: "scatter", mode: "lines", x, y, fill: "toself", fillcolor: color + "1c",
      line: { color, width: 1 }, hoverinfo: "skip", showlegend: false }];
  }

  function star(columns, shape, list, c) {
    const centre = state.view === 3 ? shape.centre.slice(2) : shape.centre.slice(0, 2);
    const rays = columns.map((column, d) => list.flatMap((i) => [centre[d], column[i], null]));
    const line = { mode: "lines", hoverinfo: "skip", showlegend: false, opacity: 0.35,
      line: { color: colourOf(c), width: 1 }, type: state.view === 3 ? "scatter3d" : "scattergl" };
    const mark = { mode: "markers", hoverinfo: "skip", showlegend: false,
      type: state.view === 3 ? "scatter3d" : "scattergl",
      marker: { symbol: state.view === 3 ? "diamond" : "star", size: state.view === 3 ? 6 : 13,
        color: colourOf(c), line: { color: ink("--ink"), width: 1 } } };
    const [x, y, z] = rays, [a, b, e] = centre.map((value) => [value]);
    return state.view === 3 ? [{ ...line, x, y, z }, { ...mark, x: a, y: b, z: e }]
      : [{ ...line, x, y }, { ...mark, x: a, y: b }];
  }

  function chosen(columns) {
    const made = [];
    if (state.chosen >= 0) {
      const near = data.near[state.chosen].filter((i) => i >= 0);
      const rays = columns.map((column) =>
        near.flatMap((i) => [column[state.chosen], column[i], null]));
      const [x, y, z] = rays;
      const line = { mode: "lines", x, y, hoverinfo: "skip", showlegend: false,
        line: { color: ink("--ink"), width: 1 } };
      made.push(state.view === 3 ? { ...line, z, type: "scatter3d" }
        : { ...line, type: "scattergl" });
      made.push(ring(columns, [state.chosen], ink("--mark"), SIZE + 10, 3));
    }
    if (state.cursor >= 0 && state.cursor !== state.chosen) {
      made.push(ring(columns, [state.cursor], ink("--ink"), SIZE + 8, 2));
    }
    return made;
  }

  function layout() {
    const soft = ink("--line"), ink1 = ink("--ink");
    const axis = (k) => ({ title: { text: data.axes[k] }, gridcolor: soft, zerolinecolor: soft,
      linecolor: soft, zeroline: true });
    const base = { uirevision: String(state.view), showlegend: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("--soft"), activecolor: ink("--mark") },
      margin: { l: 52, r: 12, t: 12, b: 44 }, annotations: names(), dragmode: state.view === 2 ? "pan" : "orbit" };
    return state.view === 2
      ? { ...base, xaxis: axis(0), yaxis: { ...axis(1), scaleanchor: "x" } }
      : { ...base, margin: { l: 0, r: 0, t: 0, b: 0 },
        scene: { xaxis: axis(0), yaxis: axis(1), zaxis: axis(2), aspectmode: "cube" } };
  }

  // plotly's own default offers to send the data to its makers' server.
  const config = { displaylogo: false, responsive: true, scrollZoom: true,
    showSendToCloud: false, plotlyServerURL: "", topojsonURL: "none",
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    toImageButtonOptions: { filename: "lorafind-map", scale: 2 } };
  let drawing = Promise.resolve();
  // One after the other: a second drawing would take the first one's canvas away.
  const draw = () => (drawing = drawing.then(() =>
    Plotly.react(plot, traces(), layout(), config)));

  // ---------------------------------------------------------------- one point

  function facts(i, parent) {
    if (data.pictures[i]) {
      const picture = element("img", undefined, parent);
      picture.alt = "Preview of " + data.name[i];
      picture.src = "data:image/jpeg;base64," + data.pictures[i];
    }
    element("strong", data.name[i], parent);
    const list = element("dl", undefined, parent);
    const rows = [["Path", data.path[i]], ["Rank", data.rank[i]], ["Family", data.family[i]],
      ["Trigger words", data.words[i].join(", ")], ["Base model", data.base[i]],
      ["Label", data.label[i]], ["Genre", data.genre[i]], ["Group", data.group[i]],
      ["Other copies", data.copies[i] || ""]];
    for (const [name, value] of rows) {
      if (value === "") continue;
      element("dt", name, list);
      element("dd", value, list);
    }
  }

  function showTip(i, x, y) {
    tip.replaceChildren();
    facts(i, tip);
    tip.hidden = false;
    tip.dataset.point = i;
    const left = x + 16 + tip.offsetWidth > innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    const top = y + 16 + tip.offsetHeight > innerHeight ? y - 8 - tip.offsetHeight : y + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }

  const hideTip = () => { tip.hidden = true; };

  async function copy(i) {
    let done = true;
    try {
      await navigator.clipboard.writeText(data.path[i]);
    } catch {
      // Without leave for the clipboard the old way may still work.
      const focus = document.activeElement, box = element("textarea", undefined, document.body);
      box.value = data.path[i];
      box.select();
      done = document.execCommand("copy");
      box.remove();
      if (focus) focus.focus({ preventScroll: true });
    }
    say(done ? "Path copied: " + data.path[i] : "The browser does not allow copying.");
  }

  const say = (text) => { status.textContent = text; };

  function choose(i, andCopy) {
    state.chosen = state.cursor = i;
    hideTip();
    detail.replaceChildren();
    detail.hidden = false;
    detail.dataset.point = i;
    facts(i, detail);
    const button = element("button", "Copy path", detail);
    button.id = "copy";
    button.type = "button";
    button.addEventListener("click", () => copy(i));
    element("h2", "Nearest", detail);
    const list = element("ol", undefined, detail);
    list.id = "nearest";
    data.near[i].forEach((other, k) => {
      if (other < 0) return;
      const choice = element("button", undefined, element("li", undefined, list));
      choice.type = "button";
      choice.dataset.point = other;
      choice.title = data.path[other];
      element("span", data.name[other], choice);
      element("span", data.scores[i][k].toFixed(2), choice).className = "score";
      choice.addEventListener("click", () => {
        choose(other, false);
        const next = document.querySelector("#nearest button");
        if (next) next.focus();
      });
    });
    say("Chosen: " + data.name[i] + ".");
    if (andCopy) copy(i);
    return draw();
  }

  function clear() {
    state.chosen = state.cursor = -1;
    state.found = [];
    detail.hidden = true;
    hideTip();
    say("");
    draw();
  }

  // ---------------------------------------------------------------- keyboard in the plot

  const extent = (column) => {
    let low = Infinity, high = -Infinity;
    for (const value of column) { low = Math.min(low, value); high = Math.max(high, value); }
    return high - low || 1;
  };

  function step(dx, dy) {
    const [x, y] = places();
    const list = [...Array(n).keys()].filter(visible);
    if (!list.length) return;
    let best = -1;
    if (state.cursor < 0) {
      best = state.chosen >= 0 ? state.chosen : list[0];
    } else {
      const from = state.cursor, w = extent(x), h = extent(y);
      let least = Infinity;
      for (const i of list) {
        const u = (x[i] - x[from]) / w, v = (y[i] - y[from]) / h;
        const along = u * dx + v * dy, aside = Math.abs(u * dy) + Math.abs(v * dx);
        // Points in one place come one after the other, before the way goes on.
        const same = u === 0 && v === 0 && (dx + dy > 0 ? i > from : i < from);
        const cost = same ? -1 / (1 + Math.abs(i - from))
          : along > 0 && aside <= along ? along * along + 2 * aside * aside : Infinity;
        if (cost < least) { least = cost; best = i; }
      }
    }
    if (best < 0) return;
    state.cursor = best;
    say(data.name[best] + (data.rank[best] ? ", rank " + data.rank[best] : "") + ", "
      + title(now().of[best]));
    draw().then(() => {
      const box = plot.getBoundingClientRect(), full = plot._fullLayout;
      if (state.view === 2) {
        showTip(best, box.left + full.xaxis._offset + full.xaxis.l2p(x[best]),
          box.top + full.yaxis._offset + full.yaxis.l2p(y[best]));
      } else {
        showTip(best, box.left + 8, box.top + 8);
      }
    });
  }

  plot.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1],
      ArrowDown: [0, -1] }[event.key];
    if (way) step(...way);
    else if (event.key === "Enter" && state.cursor >= 0) choose(state.cursor, true);
    else if (event.key === "Escape") clear();
    else return;
    event.preventDefault();
  });
  plot.addEventListener("blur", hideTip);

  // ---------------------------------------------------------------- search

  function find() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    state.found = [];
    state.active = -1;
    if (words.length) {
      for (let i = 0; i < n; i++) {
        if (words.every((word) => haystack[i].includes(word))) state.found.push(i);
      }
    }
    results.replaceChildren();
    state.found.slice(0, 50).forEach((i, k) => {
      const row = element("li", undefined, results);
      row.id = "result-" + k;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", "false");
      row.dataset.point = i;
      element("span", data.name[i] + " ", row);
      element("small", data.path[i], row);
      row.addEventListener("mousedown", (event) => { event.preventDefault(); take(i); });
    });
    open(state.found.length > 0);
    say(words.length ? state.found.length + " found" : "");
    draw();
  }

  function open(yes) {
    results.hidden = !yes;
    search.setAttribute("aria-expanded", String(yes));
    if (!yes) search.removeAttribute("aria-activedescendant");
  }

  function take(i) {
    open(false);
    if (!visible(i)) { state.hidden.delete(now().of[i]); legend(); }
    choose(i, false);
  }

  search.addEventListener("input", find);
  search.addEventListener("blur", () => open(false));
  search.addEventListener("keydown", (event) => {
    const rows = results.children, down = event.key === "ArrowDown", up = event.key === "ArrowUp";
    if ((down || up) && rows.length) {
      open(true);
      state.active = (state.active + (down ? 1 : state.active < 0 ? 0 : -1) + rows.length)
        % rows.length;
      [...rows].forEach((row, k) => row.setAttribute("aria-selected", String(k === state.active)));
      rows[state.active].scrollIntoView({ block: "nearest" });
      search.setAttribute("aria-activedescendant", "result-" + state.active);
    } else if (event.key === "Enter") {
      if (state.found.length) take(state.found[Math.max(0, state.active)]);
    } else if (event.key === "Escape") {
      search.value = "";
      find();
    } else return;
    event.preventDefault();
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
      search.focus();
      event.preventDefault();
    }
  });

  // ---------------------------------------------------------------- legend and controls

  function legend() {
    const colouring = now(), box = $("legend");
    const count = colouring.names.map(() => 0);
    colouring.of.forEach((c) => count[c]++);
    $("legend-title").textContent = colouring.title;
    box.replaceChildren();
    colouring.names.forEach((name, c) => {
      const button = element("button", undefined, box);
      button.type = "button";
      button.setAttribute("aria-pressed", String(!state.hidden.has(c)));
      const glyph = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      for (const [key, value] of [["viewBox", "0 0 16 16"], ["width", 13], ["height", 13],
        ["aria-hidden", "true"]]) glyph.setAttribute(key, value);
      path.setAttribute("d", GLYPHS[symbolOf(c, FLAT)]);
      path.setAttribute("fill", colourOf(c));
      glyph.append(path);
      button.append(glyph);
      element("span", title(c), button);
      element("span", count[c], button).className = "count";
      button.addEventListener("click", () => {
        if (!state.hidden.delete(c)) state.hidden.add(c);
        button.setAttribute("aria-pressed", String(!state.hidden.has(c)));
        draw();
      });
    });
  }

  data.colourings.forEach((one, k) => {
    element("option", one.title, $("colour")).value = k;
  });
  const genres = data.colourings.find((one) => one.key === "genre");
  if (genres) element("option", "by genre", $("hulls")).value = "genre";
  $("colour").value = first;
  $("colour").addEventListener("change", () => {
    state.colour = Number($("colour").value);
    state.hidden.clear();
    legend();
    draw();
  });
  $("view").addEventListener("change", () => {
    state.view = Number($("view").value);
    hideTip();
    draw();
  });
  for (const id of ["hulls", "stars"]) $(id).addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  $("about").textContent = n + " LoRAs of " + data.architecture + ", basis " + data.basis + ", "
    + data.way
    + (data.left_out ? "; " + data.left_out + " more are not shown" : "");
  // Hover events of the 3D view do not say where the pointer is, and its click events come only when
  // a frame is drawn while the button is down.
  const pointer = { x: 0, y: 0 };
  let hovered = -1, pressed = null;
  plot.addEventListener("pointerdown", (event) => {
    pressed = { x: event.clientX, y: event.clientY, point: hovered };
  }, true);
  plot.addEventListener("pointerup", (event) => {
    if (state.view !== 3 || !pressed || pressed.point < 0) return;
    const moved = Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y);
    if (moved < 4 && event.button === 0) choose(pressed.point, true);
    pressed = null;
  }, true);
  document.addEventListener("mousemove", (event) => {
    pointer.x = event.clientX;
    pointer.y = event.clientY;
  }, true);
  legend();
  draw().then(() => {
    plot.on("plotly_hover", (event) => {
      const i = event.points[0].customdata;
      if (i === undefined) return;
      hovered = i;
      showTip(i, pointer.x, pointer.y);
    });
    plot.on("plotly_unhover", () => {
      hovered = -1;
      hideTip();
    });
    plot.on("plotly_click", (event) => {
      const i = event.points[0].customdata;
      if (i !== undefined && state.view === 2) choose(i, true);
    });
    document.body.dataset.ready = "true";
  });
})();
