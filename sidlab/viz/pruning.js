// Draws the pruning explorer. `state` is what PruningExplorer.state in pruning.py gives;
// its docstring says what is in it.
function draw(el, state, env) {
  const CSS = `
  & { --kept: #0072B2; --on: #fff; --ink: #222; --soft: #595959; --paper: #fff; --line: #0003;
    --grey: #7F7F7F; --hatch: #7F7F7F66; --mine: #E69F0033; --up: #00704f; --down: #B34700;
    color: var(--ink); box-sizing: border-box; width: 100%; overflow-x: clip;
    font: 13px/1.35 var(--jp-ui-font-family, system-ui, "Segoe UI", "DejaVu Sans", sans-serif) }
  &.dark { --kept: #56B4E9; --on: #10151a; --ink: #E6E6E6; --soft: #B4B9BE; --paper: #14171A;
    --line: #fff4; --hatch: #9AA0A666; --mine: #E69F0044; --up: #3fcf9f; --down: #FF9A57 }
  & * { box-sizing: border-box }
  & p { margin: 0; overflow-wrap: anywhere }
  & .sides { display: flex; gap: 20px; align-items: flex-start; margin-top: 6px }
  & .left { flex: 1 1 0; min-width: 0 }
  & .right { flex: 0 0 32%; max-width: 310px; min-width: 190px }
  &.narrow .sides { flex-direction: column; gap: 8px; align-items: stretch }
  &.narrow .right { flex: none; max-width: none }
  & .caption { color: var(--soft); font-size: 12px; min-height: 17px; margin: 2px 0 }
  & .caption b { color: var(--ink) }
  & .key { white-space: nowrap; margin-left: 9px }
  & .key i { display: inline-block; width: 11px; height: 11px; vertical-align: -1px;
    margin-right: 3px }
  & i.kept { border: 1px solid var(--kept);
    background: linear-gradient(to top, var(--kept) 60%, transparent 60%) }
  & .key i.says { width: 8px; height: 8px; border-radius: 50%; background: #E69F00;
    border: 1px solid #222 }
  & .strip { display: flex; flex-wrap: wrap; gap: 5px 8px; align-content: flex-start;
    overflow-y: auto; position: relative }
  & .after { overflow: visible; gap: 3px 6px }
  & .group { display: flex; gap: 2px }
  & .title { font-size: 11px; line-height: 13px; height: 26px; width: 100%; overflow: hidden;
    overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
    -webkit-line-clamp: 2 }
  & .token { position: relative; flex: none; height: 36px; border: 1.5px solid var(--kept);
    border-radius: 3px; background: var(--paper); overflow: hidden; outline-offset: 1px;
    color: var(--on) }
  & .token:focus-visible { outline: 2.5px solid #D55E00; overflow: visible }
  & .bar { position: absolute; left: 2px; right: 2px; bottom: 15px;
    height: calc(var(--importance) * (100% - 17px)); background: var(--kept) }
  & .code { position: absolute; left: 0; right: 0; bottom: 0; height: 15px; text-align: center;
    font-size: 11px; line-height: 14px; background: var(--kept) }
  & .dot { position: absolute; top: 1px; right: 1px; width: 7px; height: 7px; border-radius: 50%;
    background: #E69F00; border: 1px solid #222; display: none }
  & .informative .dot { display: block }
  & .small .token { height: 25px }
  & .small .code { display: none }
  & .small .bar { bottom: 0; height: calc(var(--importance) * (100% - 1px)); left: 1px;
    right: 1px }
  & .small .dot { width: 6px; height: 6px }
  & .tiny .title { display: block; height: 13px; font-size: 10px; white-space: nowrap;
    text-overflow: ellipsis }
  & .token[data-kept=false], & i.pruned { border: 1.5px dashed var(--grey);
    background: var(--paper)
      repeating-linear-gradient(45deg, var(--hatch) 0 1.5px, transparent 1.5px 5px);
    color: var(--ink) }
  & .token[data-kept=false] .bar { background: var(--grey); opacity: .75 }
  & .token[data-kept=false] .code { background: var(--paper) }
  & .hands .token { cursor: pointer }
  & .waiting { opacity: .45 }
  & .cut { border-top: 2px dashed var(--grey); margin-top: 6px; padding-top: 3px }
  & .hover { color: var(--soft); font-size: 12px; line-height: 16px; overflow-wrap: anywhere }
  & .left .hover { flex: 1 1 340px; min-width: 0; height: 32px; overflow: hidden }
  & .left .row { margin-top: 4px }
  & .left button { flex: none }
  & button { font: inherit; color: var(--ink); background: transparent;
    border: 1px solid var(--grey); border-radius: 4px; padding: 2px 9px; cursor: pointer }
  & button:focus-visible { outline: 2.5px solid #D55E00 }
  & button[aria-pressed=true] { background: var(--kept); color: var(--on);
    border-color: var(--kept) }
  & .row { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center }
  & ol { list-style: none; margin: 0; padding: 0; min-height: 242px; position: relative }
  & li { display: flex; gap: 8px; height: 22px; line-height: 21px; padding: 0 5px; margin: 0;
    border-bottom: 1px solid var(--line) }
  & li > :nth-child(1) { flex: 0 0 20px; text-align: right; color: var(--soft) }
  & li > :nth-child(2) { flex: 1 1 0; min-width: 0; white-space: nowrap; overflow: hidden;
    text-overflow: ellipsis }
  & li > :nth-child(3) { flex: none; color: var(--soft) }
  & li.target { background: var(--mine); font-weight: 600 }
  & li.missing { border: 1px dashed var(--grey) }
  & .up { color: var(--up) !important }
  & .down { color: var(--down) !important }
  & .dropped { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
  & canvas { display: block; image-rendering: pixelated; border: 1px solid var(--grey);
    transition: width .4s, height .4s }
  &.still canvas { transition: none }
  & .pair { display: flex; gap: 4px 10px; align-items: flex-start; flex-wrap: wrap }
  & .pair > div { flex: none }
  & .thumbs { min-height: 80px }
  & .thumbs > :last-child { flex: 1 1 100px; margin: 0 }
  & .large canvas { cursor: crosshair }
  & .folds { display: flex; flex-wrap: wrap; gap: 4px 22px; margin-top: 6px }
  & details[open] { flex: 1 0 100%; min-width: 0 }
  & summary { cursor: pointer }
  & table { border-collapse: collapse; margin: 4px 0; font-size: 12px; color: var(--ink) }
  & th, & td { text-align: left; padding: 1px 10px 1px 3px; border-bottom: 1px solid var(--line);
    max-width: 24rem; overflow-wrap: break-word }
  & th { font-weight: 600; white-space: nowrap }
  & .you { background: var(--mine); font-weight: 600 }
  & .right table { width: 100% }
  & .right td, & .right th { line-height: 15px; padding-right: 5px }
  & .scroll { max-height: 300px; overflow: auto }
  & input[type=number] { width: 4em; font: inherit }
  & .meter { display: inline-block; height: 9px; background: var(--kept) }
  & [hidden] { display: none }`.replaceAll("&", ".sidlab-pruning");
  const CIVIDIS = "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838".split(" ")
    .map(color => [0, 2, 4].map(i => parseInt(color.slice(i, i + 2), 16)));
  // Pixels of the side of an attention map.
  const THUMB = 78, LARGE = 320;
  // The width of a token, the look of its strip, how high an item is in both strips together, and in
  // how many pixels they have to fit.
  const SIZES = [
    [24, "", 106, 220],
    [20, "", 106, 320],
    [16, "", 106, 320],
    [12, "small", 85, 320],
    [9, "small tiny", 72, 320],
  ];

  const make = (tag, look = "", text = "", attributes = {}) => {
    const node = document.createElement(tag);
    node.className = look;
    node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };

  // The parts that stay, made once.
  function build() {
    const root = make("div", "sidlab-pruning");
    const parts = { root, tokens: [], left: new Map(), rows: new Map() };
    const part = (name, parent, tag, look = "", text = "", attributes = {}) => {
      parent.append(parts[name] = make(tag, look, text, attributes));
      return parts[name];
    };
    part("style", root, "style", "", CSS);
    part("alert", root, "div", "", "", { role: "status" });
    part("said", root, "div", "sidlab-said", "", { role: "status" });
    const sides = part("sides", root, "div", "sides");
    const left = part("leftSide", sides, "div", "left");
    const right = part("rightSide", sides, "div", "right");

    part("caption", left, "div", "caption");
    part("strip", left, "div", "strip", "", { role: "group" });
    part("cut", left, "div", "caption cut");
    part("after", left, "div", "strip after", "", { role: "img" });
    const below = left.appendChild(make("div", "row"));
    part("hand", below, "button", "", "✂ prune by hand", { type: "button" });
    part("again", below, "button", "", "keep all", { type: "button" });
    part("hover", below, "div", "hover");

    const recommended = part("recommended", right, "div", "recommended");
    part("listCaption", recommended, "div", "caption", "recommended");
    part("list", recommended, "ol");
    part("dropped", recommended, "div", "caption dropped");
    const thumbs = part("thumbs", right, "div", "pair thumbs");
    for (const name of ["before", "behind"])
      part(name, thumbs.appendChild(make("div")), "canvas", "", "", { role: "img" });
    part("costText", thumbs, "div", "caption");
    part("scores", right, "div");

    const folds = part("folds", root, "div", "folds");
    const fold = (name, summary) => {
      const details = part(name, folds, "details");
      details.append(make("summary", "", summary));
      details.addEventListener("toggle", () => el.again());
      return details;
    };
    const maps = fold("maps", "attention maps");
    part("mapHover", maps, "div", "hover", "", { role: "status" });
    const large = maps.appendChild(make("div", "pair large"));
    for (const name of ["largeBefore", "largeBehind"]) {
      const box = large.appendChild(make("div"));
      part(`${name}Caption`, box, "div", "caption");
      part(name, box, "canvas", "", "", { role: "img", tabindex: 0 });
    }
    part("tables", fold("figures", "cost and tables"), "div", "scroll");
    const rule = fold("rule", "a rule of your own, over many users");
    part("form", rule, "div", "row");
    part("ruled", rule, "div", "", "", { role: "status" });

    // The game.
    parts.hand.onclick = () => {
      parts.sent = undefined;
      el.env.act({ hand: parts.hand.getAttribute("aria-pressed") !== "true" });
    };
    parts.again.onclick = () => prune(parts, []);
    parts.strip.addEventListener("click", event => clicked(parts, event.target.closest(".token")));
    parts.strip.addEventListener("keydown", event => pressed(parts, event));
    for (const strip of [parts.strip, parts.after])
      for (const kind of ["mouseover", "focusin"])
        strip.addEventListener(kind, event => {
          const token = event.target.closest(".token");
          if (!token) return;
          parts.at = Number(token.dataset.token);
          parts.hover.textContent = token.title;
        });
    for (const name of ["largeBefore", "largeBehind"]) {
      const canvas = parts[name];
      canvas.addEventListener("mousemove", event => look(canvas, event.offsetX, event.offsetY));
      canvas.addEventListener("keydown", event => walk(canvas, event));
    }
    el.append(root);
    const resized = () => {
      if (Math.abs(root.clientWidth - (parts.width ?? 0)) > 1) el.again();
    };
    new ResizeObserver(resized).observe(root);
    return parts;
  }

  // Keep a key from JupyterLab, which would go to another cell.
  const hears = event => {
    event.preventDefault();
    event.stopPropagation();
  };

  function clicked(parts, token) {
    if (!token || !el.state.hand.on) return;
    const pruned = new Set(parts.sent ?? el.state.hand.pruned);
    const place = Number(token.dataset.token);
    if (!pruned.delete(place)) pruned.add(place);
    if (pruned.size === parts.tokens.length) {
      parts.hover.textContent = "One token has to stay.";
      return;
    }
    token.classList.add("waiting");
    prune(parts, [...pruned].sort((a, b) => a - b));
  }

  // Clicks may come faster than answers: the next one builds on what was sent.
  function prune(parts, tokens) {
    parts.sent = tokens;
    el.env.act({ pruned: tokens });
  }

  function pressed(parts, event) {
    const token = event.target.closest(".token");
    if (!token || event.shiftKey || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = Number(token.dataset.token), last = parts.tokens.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      hears(event);
      const next = parts.tokens[Math.max(0, Math.min(to, last))];
      parts.tokens.forEach(other => other.tabIndex = other === next ? 0 : -1);
      next.focus();
    } else if ((event.key === "Enter" || event.key === " ") && el.state.hand.on) {
      hears(event);
      clicked(parts, token);
    }
  }

  const width = el.parts?.root.clientWidth || el.clientWidth || 900;
  const parts = el.parts ??= build();
  const first = el.state === undefined;
  const other = !first && el.state.tokens.name.join() !== state.tokens.name.join();
  const wasWide = parts.width;
  el.state = state;
  el.env = env;
  el.again = () => draw(el, el.state, el.env);
  parts.width = width;
  const { tokens, hand } = state, flags = tokens.kept, n = flags.length;
  const kept = flags.reduce((sum, flag) => sum + flag, 0);
  const words = token => `${tokens.name[token]}: code ${tokens.code[token]}, `
    + `${flags[token] ? "kept" : "pruned"}, ${tokens.fact[token]}`;
  const moving = !env.reduced && !first && !other && wasWide === width && !document.hidden;
  const answered = JSON.stringify(parts.sent) === JSON.stringify(hand.pruned);
  if (other || !hand.on || answered) parts.sent = undefined;
  const html = (node, text) => { if (node.was !== text) node.innerHTML = node.was = text; };

  // Where things are now, so that they can move to where they will be.
  const places = nodes =>
    new Map([...nodes].map(([key, node]) => [key, node.getBoundingClientRect()]));
  const before = moving ? [places(parts.left), places(parts.rows)] : [new Map(), new Map()];

  parts.root.classList.toggle("dark", Boolean(env.dark));
  parts.root.classList.toggle("still", Boolean(env.reduced));
  parts.root.classList.toggle("narrow", width < 460);
  html(parts.alert, state.alert ?? "");
  html(parts.said, state.text);

  strips();
  list();
  costs();
  tables();
  play();
  rules();

  function box(token) {
    const node = make("div", "token");
    node.append(make("div", "bar"), make("div", "code"), make("div", "dot"));
    node.dataset.token = token;
    return node;
  }

  function dress(node, token, size) {
    node.style.width = `${size}px`;
    node.dataset.kept = Boolean(flags[token]);
    node.title = words(token);
    node.classList.toggle("informative", Boolean(tokens.informative[token]));
    node.classList.remove("waiting");
    node.style.setProperty("--importance", tokens.scaled[token]);
    node.children[1].textContent = tokens.code[token];
  }

  // The strip, item by item in lines, and what is left of it. Tokens are the largest with which both
  // fit; where even the smallest do not, the strip scrolls.
  function strips() {
    const available = parts.leftSide.clientWidth || width, levels = state.levels.length;
    const lines = size => {
      const across = Math.max(1, Math.floor((available + 8) / ((size + 2) * levels + 6)));
      return Math.ceil(state.items.title.length / across);
    };
    const fits = ([size, , height, most]) => lines(size) * height <= most;
    const [size, look] = SIZES.find(fits) ?? SIZES.at(-1);
    parts.strip.className = `strip ${look}${hand.on ? " hands" : ""}`;
    parts.after.className = `strip after ${look}`;
    parts.strip.style.maxHeight = "230px";
    const key = (mark, what) => `<span class="key"><i class="${mark}"></i>${what}</span>`;
    html(parts.caption, [
      `<b>all ${n} tokens</b> in layer${state.layer > 1 ? `s 1–${state.layer}` : " 1"}`,
      key("kept", "kept (bar: importance)"),
      key("pruned", "pruned"),
      tokens.informative.length ? key("says", "truly informative") : "",
    ].join(" "));

    if (parts.tokens.length !== n || first || other) {
      parts.strip.replaceChildren();
      parts.tokens = [];
      state.items.title.forEach((title, item) => {
        const column = make("div", "item");
        const row = make("div", "group");
        column.append(make("div", "title", `${item + 1}. ${title}`, { title }), row);
        tokens.item.forEach((of, token) => {
          if (of === item) row.append(parts.tokens[token] = box(token));
        });
        parts.strip.append(column);
      });
      parts.after.replaceChildren();
      parts.left.clear();
      parts.at = undefined;
    }
    for (const column of parts.strip.children) column.style.width = `${(size + 2) * levels - 2}px`;
    parts.tokens.forEach((node, token) => {
      dress(node, token, size);
      node.setAttribute("aria-label", words(token));
      node.setAttribute("role", hand.on ? "button" : "img");
      if (hand.on) node.setAttribute("aria-pressed", !flags[token]);
      else node.removeAttribute("aria-pressed");
      if (!node.hasAttribute("tabindex")) node.tabIndex = token ? -1 : 0;
    });
    const label = `${state.label} ${n} tokens; arrow keys go from one to the next.`;
    parts.strip.setAttribute("aria-label", label);
    if (parts.at !== undefined) parts.hover.textContent = words(parts.at);
    else parts.hover.textContent = hand.on
      ? "Click the tokens that you would prune; once more, and one is back."
      : "The oldest item comes first. Point at a token to read what it is.";

    const behind = state.layers - state.layer;
    const later = behind > 1 ? `layers ${state.layer + 1}–${state.layers} and `
      : behind ? `layer ${state.layers} and ` : "";
    html(parts.cut, `✂ after layer ${state.layer}: <b>${n - kept} fall out, ${kept} go on</b> `
      + `to ${later}the decoder`);

    // The shorter strip: a group for each item, so that one sees where an item ends.
    const gone = [...parts.left.keys()].filter(token => !flags[token]);
    const come = [];
    const falling = gone.map(token => [parts.left.get(token), before[0].get(token)]);
    gone.forEach(token => parts.left.delete(token));
    parts.after.querySelectorAll(".leaving").forEach(node => node.remove());
    const groups = new Map();
    for (let token = 0; token < n; token++) {
      if (!flags[token]) continue;
      let node = parts.left.get(token);
      if (!node) {
        parts.left.set(token, node = box(token));
        come.push(token);
      }
      dress(node, token, size);
      const item = tokens.item[token];
      if (!groups.has(item)) groups.set(item, make("div", "group"));
      groups.get(item).append(node);
    }
    parts.after.replaceChildren(...groups.values());
    // As high as all tokens were, so that nothing below jumps.
    parts.after.style.minHeight = `${lines(size) * (look ? 28 : 39)}px`;
    const level = node => state.levels[tokens.level[node.dataset.token]];
    const named = group => [...group.children].map(level);
    const said = [...groups].map(([item, group]) => `item ${item + 1}: ${named(group).join(", ")}`);
    parts.after.setAttribute("aria-label", `Kept tokens. ${said.join("; ")}.`);

    if (!moving) return;
    come.forEach(token => before[0].set(token, parts.tokens[token].getBoundingClientRect()));
    slide(parts.left, before[0]);
    for (const [node, from] of falling)
      leave(parts.after, node, from, "translate(0, 46px) rotate(14deg)");
  }

  // From the old place to the new one (FLIP: first, last, invert, play).
  function slide(nodes, from) {
    for (const [key, node] of nodes) {
      node.getAnimations().forEach(animation => animation.cancel());
      const then = from.get(key), now = node.getBoundingClientRect();
      if (!then) {
        node.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 400 });
        continue;
      }
      const x = then.left - now.left, y = then.top - now.top;
      if (Math.abs(x) < 0.5 && Math.abs(y) < 0.5) continue;
      const steps = [{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }];
      node.animate(steps, { duration: 450, easing: "cubic-bezier(.3, .7, .3, 1)" });
    }
  }

  function leave(parent, node, from, transform) {
    if (!from) return;
    const frame = parent.getBoundingClientRect();
    node.classList.add("leaving");
    node.removeAttribute("data-token");
    node.removeAttribute("data-item");
    node.setAttribute("aria-hidden", "true");
    Object.assign(node.style, {
      position: "absolute",
      left: `${from.left - frame.left}px`,
      top: `${from.top - frame.top}px`,
      width: `${from.width}px`,
      pointerEvents: "none",
    });
    parent.append(node);
    const steps = [{ opacity: 1, transform: "none" }, { opacity: 0, transform }];
    const animation = node.animate(steps, { duration: 500, easing: "ease-in", fill: "forwards" });
    animation.onfinish = () => node.remove();
  }

  function list() {
    const ids = state.list.after.map(String), target = String(state.target.item);
    const wanted = new Map();
    const row = (key, cells, looks) => {
      const node = parts.rows.get(key) ?? make("li");
      node.className = looks;
      if (!node.children.length) node.append(make("span"), make("span"), make("span"));
      cells.forEach((cell, i) => node.children[i].textContent = cell);
      node.children[1].title = cells[1];
      wanted.set(key, node);
      return node;
    };
    ids.forEach((id, i) => {
      const moved = state.list.moved[i], star = id === target ? "★ " : "";
      const node = row(id, [i + 1, star + state.list.title[i], moved], star && "target");
      node.dataset.item = id;
      node.dataset.place = i + 1;
      node.children[2].className = moved[0] === "▲" ? "up" : moved[0] === "▼" ? "down" : "";
    });
    if (!state.target.after) {
      const cells = ["–", `★ ${state.target.title}`, "not in the list"];
      const node = row(target, cells, "target missing");
      delete node.dataset.item;
      delete node.dataset.place;
      node.children[2].className = "";
    }
    const leaving = [...parts.rows].filter(([key]) => !wanted.has(key));
    parts.list.replaceChildren(...wanted.values());
    parts.rows = wanted;
    const out = state.list.out;
    parts.dropped.textContent = out.length ? `dropped out: ${out.join("; ")}` : "";
    parts.dropped.title = parts.dropped.textContent;
    if (!moving) return;
    slide(parts.rows, before[1]);
    for (const [key, node] of leaving)
      leave(parts.list, node, before[1].get(key), "translate(40px, 0)");
  }

  function paint(canvas, cells, side, scale, label) {
    canvas.hidden = !cells;
    canvas.setAttribute("aria-label", label);
    canvas.style.width = canvas.style.height = `${Math.round(side * scale) + 2}px`;
    if (!cells || canvas.was === cells + state.attention.top) return;
    canvas.was = cells + state.attention.top;
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d"), image = context.createImageData(side, side);
    for (let i = 0; i < side * side; i++) {
      const at = Math.min(0.999, weight(cells, i) / state.attention.top) * (CIVIDIS.length - 1);
      const low = CIVIDIS[Math.floor(at)], high = CIVIDIS[Math.floor(at) + 1];
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = low[c] + (at % 1) * (high[c] - low[c]);
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  function weight(cells, i) { return (cells.charCodeAt(i) - 35) / 10000; }

  // Two maps to one scale: their areas are what attention costs.
  function costs() {
    const { before, after } = state.attention, share = 100 * kept * kept / (n * n);
    const labels = [
      `Attention in layer ${state.layer}, ${n} × ${n} tokens`,
      `Attention in layer ${state.layer + 1}, ${kept} × ${kept} tokens`,
    ];
    paint(parts.before, before, n, THUMB / n, labels[0]);
    paint(parts.behind, after, kept, THUMB / n, labels[1]);
    const percent = share < 9.5 ? share.toFixed(1) : Math.round(share);
    html(parts.costText, after
      ? `attention, area = cost: ${n}² → ${kept}², <b>${percent}%</b>`
      : `attention in layer ${state.layer}; no layer after the pruner`);
    if (!parts.maps.open) return;
    paint(parts.largeBefore, before, n, LARGE / n, labels[0]);
    paint(parts.largeBehind, after, kept, LARGE / n, labels[1]);
    parts.largeBeforeCaption.textContent = `layer ${state.layer}, before: ${n} × ${n}`;
    parts.largeBehindCaption.textContent = after
      ? `layer ${state.layer + 1}, after: ${kept} × ${kept}` : "no layer after the pruner";
    if (!parts.mapHover.textContent)
      parts.mapHover.textContent = "A row is a token that looks, a column one that is looked at; "
        + "mean over heads. Point at a cell, or go there with the arrow keys.";
  }

  // Says what stands in a cell of a large map: pixels from its corner.
  function look(canvas, x, y) {
    const side = canvas.width;
    const at = value => Math.floor(value / canvas.clientWidth * side);
    const within = value => Math.max(0, Math.min(side - 1, at(value)));
    tell(canvas, within(y), within(x));
  }

  function tell(canvas, query, key) {
    const { tokens, attention } = el.state, late = canvas === el.parts.largeBehind;
    const names = tokens.name.filter((_, token) => !late || tokens.kept[token]);
    const value = weight(late ? attention.after : attention.before, query * names.length + key);
    const shown = value ? Number(value.toPrecision(2)) : "less than 0.0001";
    canvas.cell = [query, key];
    canvas.title = `${names[query]} looks at ${names[key]}: ${shown}`;
    el.parts.mapHover.textContent = canvas.title;
  }

  function walk(canvas, event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key], cell = canvas.cell ?? [0, 0];
    if (!step || event.shiftKey) return;
    hears(event);
    const within = value => Math.max(0, Math.min(canvas.width - 1, value));
    tell(canvas, within(cell[0] + step[0]), within(cell[1] + step[1]));
  }

  function table(head, rows, mine = -1) {
    const node = make("table");
    const line = (cells, tag, look) => {
      const row = make("tr", look), attributes = tag === "th" ? { scope: "col" } : {};
      const fill = cell => cell instanceof Node ? cell : make(tag, "", cell, attributes);
      row.append(...cells.map(fill));
      return row;
    };
    const top = node.appendChild(make("thead")), body = node.appendChild(make("tbody"));
    top.append(line(head, "th", ""));
    body.append(...rows.map((cells, i) => line(cells, "td", i === mine ? "you" : "")));
    return node;
  }

  function tables() {
    if (!parts.figures.open) return;
    const by = state.items.title.map((title, item) => {
      const left = tokens.item.flatMap((of, token) => of === item && flags[token] ? [token] : []);
      const levels = left.map(token => state.levels[tokens.level[token]]).join(", ");
      return [`${item + 1}. ${title}`, levels || "–"];
    });
    const what = make("div", "row");
    what.style.alignItems = "flex-start";
    what.append(table(state.meter.head, state.meter.rows), table(["item", "kept"], by));
    parts.tables.replaceChildren(what);
  }

  // A button that copies a text. Without a clipboard (a page that is not https) the old way.
  function copier(text) {
    const button = make("button", "", "copy", { type: "button" });
    const old = () => {
      const area = make("textarea");
      area.value = text;
      el.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    };
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        old();
      }
      button.textContent = "copied";
      setTimeout(() => button.textContent = "copy", 1500);
    };
    return button;
  }

  function play() {
    parts.hand.hidden = parts.rule.hidden = !state.game;
    parts.hand.setAttribute("aria-pressed", hand.on);
    parts.again.hidden = !hand.pruned.length;
    parts.scores.hidden = !hand.rows.length;
    parts.thumbs.hidden = hand.rows.length > 0;
    if (!hand.rows.length || parts.scores.was === hand.text) return;
    parts.scores.was = hand.text;
    const verdict = make("div", "row");
    verdict.append(make("span", "", hand.verdict), copier(hand.text));
    const scores = table([`${kept} kept by`, "place", "log-prob."], hand.rows, 0);
    parts.scores.replaceChildren(scores, verdict);
  }

  function rules() {
    const form = parts.form;
    if (form.was !== state.levels.join()) {
      form.was = state.levels.join();
      form.replaceChildren(make("span", "", "keep"));
      const boxes = state.levels.map((level, i) => {
        const label = make("label"), check = make("input", "", "", { type: "checkbox" });
        check.checked = i < 2;
        label.append(check, ` ${level}`);
        form.append(label);
        return check;
      });
      const label = make("label", "", "of the newest ");
      const newest = make("input", "", "", { type: "number", min: 1, max: 50, value: 6 });
      label.append(newest, " items");
      const go = make("button", "", "score it", { type: "button" });
      form.append(label, go);
      go.onclick = () => {
        const levels = boxes.flatMap((check, i) => check.checked ? [i] : []);
        const items = Math.round(Number(newest.value));
        if (!levels.length || !(items >= 1)) {
          parts.ruled.textContent = "Choose at least one level and one item.";
          return;
        }
        parts.ruled.textContent = "working …";
        el.env.act({ rule: { levels, newest: items } });
      };
    }
    const { rule } = state;
    const failed = state.alert?.includes('role="alert"');
    if (failed && parts.ruled.textContent === "working …") parts.ruled.textContent = "";
    if (!rule?.number || parts.ruled.number === rule.number) return;
    parts.ruled.number = rule.number;
    const top = Math.max(...rule.rows.map(row => Number(row[1]))) || 1;
    const rows = rule.rows.map(([name, recall]) => {
      const cell = make("td"), bar = make("span", "meter");
      bar.style.width = `${Math.round(160 * Number(recall) / top)}px`;
      cell.append(bar);
      return [name, recall, cell];
    });
    const said = make("div", "row");
    const what = `${rule.what}: ${rule.share} of the tokens; recall@10 of ${rule.users} users, `
      + "all keeping as many of each user's";
    said.append(make("span", "", what), copier(rule.text));
    parts.ruled.replaceChildren(said, table(["kept by", "recall@10", ""], rows, 0));
  }
}
