"use strict";
// The rationale viewer. All text of the run reaches the page through textContent alone; nothing is ever loaded.
// Data: [{label, versions, found, snippets: [{id, name, x: lines, n: tokens of each,
//   v: {version: [{m: member, r: reward, l: nats of each line, p: p(think) of each,
//                  z: {line: [thought, tokens, gain, advantage]}}]}}]}]
(() => {
  const groups = JSON.parse(document.getElementById("rv-data").textContent);
  const part = (name) => document.getElementById("rv-" + name);
  const state = { g: 0, s: 0, l: 0, r: -1, m: "", c: "gain", q: "", t: 0 };
  let visible = [];

  // ------------------------------------------------------------------ small helpers

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function signed(value, digits = 2) {
    if (value === null || value === undefined) return "";
    const text = Math.abs(value).toFixed(digits);
    return (Number(text) === 0 ? "" : value < 0 ? "\u2212" : "+") + text;
  }

  function plain(value, digits = 2) {
    return value === null || value === undefined ? "–" : (value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(digits);
  }

  // The value that 95 % of the numbers do not exceed, rounded up to 1, 2 or 5 times a power of ten.
  function scaleOf(values) {
    const sorted = values.filter((v) => Number.isFinite(v)).map(Math.abs).sort((a, b) => a - b);
    if (!sorted.length) return 0;
    const high = Math.max(sorted[Math.floor(0.95 * (sorted.length - 1))], 1e-3);
    const power = Math.pow(10, Math.floor(Math.log10(high)));
    return [1, 2, 5, 10].map((k) => k * power).find((k) => k >= high * 0.999);
  }

  function tint(element, value, scale, sequential) {
    if (value === null || value === undefined || !scale) return;
    const strength = Math.min(1, Math.abs(value) / scale);
    element.classList.add("tint", sequential ? "seq" : value < 0 ? "neg" : "pos");
    element.style.setProperty("--a", strength.toFixed(3));
  }

  // ------------------------------------------------------------------ the data

  const group = () => groups[state.g];
  const snippet = () => group().snippets[state.s];

  function rollout(entry, version) {
    const rolled = (version >= 0 && entry.v[version]) || [];
    return rolled.find((one) => String(one.m) === state.m) || rolled[0] || null;
  }

  const perToken = (entry, one, line) => (one.l[line] === null ? null : one.l[line] / Math.max(1, entry.n[line]));

  function change(entry, line) {
    const [left, right] = [rollout(entry, state.l), rollout(entry, state.r)];
    if (!left || !right) return null;
    const [a, b] = [perToken(entry, left, line), perToken(entry, right, line)];
    return a === null || b === null ? null : b - a;
  }

  function haystack(entry) {
    if (!entry.text) {
      const thoughts = Object.values(entry.v).flat().flatMap((one) => Object.values(one.z).map((z) => z[0]));
      entry.text = [entry.name + " #" + entry.id, ...entry.x, ...thoughts].join("\n").toLowerCase();
    }
    return entry.text;
  }

  // One colour scale for all snippets of a stage, so that snippets can be compared.
  function scales() {
    const found = { gain: [], advantage: [], logprob: [], change: [] };
    for (const entry of group().snippets) {
      for (const one of Object.values(entry.v).flat()) {
        for (const z of Object.values(one.z)) {
          if (z[2] !== null) found.gain.push(z[2]);
          if (z[3] !== null) found.advantage.push(z[3]);
        }
        entry.x.forEach((_, line) => found.logprob.push(perToken(entry, one, line) ?? NaN));
      }
      if (state.c === "change") entry.x.forEach((_, line) => found.change.push(change(entry, line) ?? NaN));
    }
    const result = { think: 1 };
    for (const name of Object.keys(found)) result[name] = scaleOf(found[name]);
    return result;
  }

  // ------------------------------------------------------------------ the parts of the viewer

  function options(select, names, chosen) {
    select.replaceChildren(...names.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
    select.value = String(chosen);
  }

  function drawControls() {
    const versions = group().versions.map((name, i) => [String(i), name]);
    options(part("group"), groups.map((one, i) => [String(i), one.label]), state.g);
    options(part("left"), versions, state.l);
    options(part("right"), [["-1", "nothing"], ...versions], state.r);
    const entry = snippet();
    const members = entry ? [...new Set(Object.values(entry.v).flat().map((one) => String(one.m)))] : [];
    if (!members.includes(state.m)) state.m = members[0] ?? "";
    options(part("member"), members.map((m) => [m, "#" + m]), state.m);
    part("mode").querySelector("[value=change]").disabled = state.r < 0;
    if (state.r < 0 && state.c === "change") state.c = "gain";
    part("mode").value = state.c;
    part("thoughts").checked = Boolean(state.t);
    if (part("search").value !== state.q) part("search").value = state.q;
  }

  const LEGENDS = {
    gain: ["line", "gain of its thought, nats per token", false],
    logprob: ["line", "log-probability, nats per token", true],
    think: ["line", "probability of a thought before it", true],
    change: ["line", "log-probability right \u2212 left, nats per token", false],
  };

  function scaleBar(name, meaning, scale, sequential, negative) {
    const bar = make("span", "rv-scale");
    const steps = make("span", "rv-steps");
    const from = sequential ? 0 : -5;
    for (let i = from; i <= 5; i += 1) {
      const step = make("i");
      tint(step, (i / 5) * scale, scale, sequential);
      steps.append(step);
    }
    const end = scale >= 1 ? String(scale) : scale.toPrecision(1);
    const low = sequential ? "0" : "\u2212" + end;
    bar.append(make("b", "", name), make("span", "", meaning), make("span", "", low), steps);
    bar.append(make("span", "", sequential ? (negative ? "\u2212" + end : end) : "+" + end));
    return bar;
  }

  function drawLegend(scale) {
    const [name, meaning, sequential] = LEGENDS[state.c];
    const bars = [];
    if (scale[state.c]) bars.push(scaleBar(name, meaning, scale[state.c], sequential, state.c === "logprob"));
    if (scale.advantage) bars.push(scaleBar("thought", "advantage, unit of the reward", scale.advantage, false, false));
    else if (scale.gain) bars.push(scaleBar("thought", "its gain, nats per token", scale.gain, false, false));
    if (!scale[state.c]) bars.push(make("span", "", "no line has a value for this colour"));
    part("legend").replaceChildren(...bars);
  }

  function itemFacts(entry) {
    const shown = [state.l, state.r].filter((v) => v >= 0).map((v) => rollout(entry, v));
    const thoughts = shown.map((one) => (one ? Object.keys(one.z).length : "–")).join(" → ");
    const rewards = shown.some((one) => one && one.r !== null);
    const reward = rewards ? ", reward " + shown.map((one) => (one ? plain(one.r, 3) : "–")).join(" → ") : "";
    return [`${entry.x.length} lines, thoughts ${thoughts}`, reward.slice(2)];
  }

  function drawList() {
    const query = state.q.toLowerCase();
    const all = group().snippets;
    visible = all.map((_, i) => i).filter((i) => !query || haystack(all[i]).includes(query));
    if (visible.length && !visible.includes(state.s)) state.s = visible[0];
    const items = visible.map((i) => {
      const item = make("div", "rv-item");
      item.id = "rv-item-" + i;
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", String(i === state.s));
      item.append(make("b", "", `${all[i].name} #${all[i].id}`.trim()));
      for (const fact of itemFacts(all[i])) if (fact) item.append(make("span", "", fact));
      item.addEventListener("click", () => { state.s = i; draw(); });
      return item;
    });
    part("list").replaceChildren(...(items.length ? items : [make("div", "rv-none", "nothing found")]));
    part("list").setAttribute("aria-activedescendant", items.length ? "rv-item-" + state.s : "");
    const capped = group().found > all.length ? ` (${group().found} in the files)` : "";
    part("count").textContent = `${visible.length} of ${all.length} snippets${capped}`;
    const chosen = document.getElementById("rv-item-" + state.s);
    if (chosen) {
      const list = part("list");
      const top = chosen.offsetTop - list.offsetTop;
      if (top < list.scrollTop || top + chosen.offsetHeight > list.scrollTop + list.clientHeight) {
        list.scrollTop = top - list.clientHeight / 3;
      }
    }
  }

  // Text with the searched words marked.
  function marked(text) {
    const code = make("code");
    const query = state.q.toLowerCase();
    let from = 0;
    if (query && text.toLowerCase().length === text.length) {
      for (let at = text.toLowerCase().indexOf(query); at >= 0; at = text.toLowerCase().indexOf(query, from)) {
        code.append(text.slice(from, at), make("mark", "", text.slice(at, at + query.length)));
        from = at + query.length;
      }
    }
    code.append(text.slice(from));
    return code;
  }

  function lineValue(entry, one, line) {
    if (state.c === "gain") return one.z[line] ? one.z[line][2] : null;
    if (state.c === "think") return one.p[line];
    return state.c === "change" ? change(entry, line) : perToken(entry, one, line);
  }

  function drawThought(entry, thought, line, scale) {
    const [text, tokens, gain, advantage] = thought;
    const block = make("div", "rv-thought");
    const indent = /^[ \t]*/.exec(entry.x[line])[0];
    block.append(marked(indent + (/^[#<]/.test(text) ? text : "# " + text)));
    // Where nothing was learned from the rollouts there are no advantages: then the gain is shown.
    const value = scale.advantage ? advantage : gain;
    block.append(make("em", "", signed(value)));
    block.title = `thought of ${tokens} tokens; advantage ${signed(advantage, 3) || "not known"}; ` +
      `gain ${signed(gain, 3) || "not known"} nats per token`;
    tint(block, value, scale.advantage || scale.gain, false);
    return block;
  }

  function drawCell(entry, version, line, scale) {
    const cell = make("div", "rv-cell");
    const one = rollout(entry, version);
    if (!one) return cell;
    if (one.z[line]) cell.append(drawThought(entry, one.z[line], line, scale));
    const block = make("div", "rv-line");
    const value = lineValue(entry, one, line);
    const sequential = LEGENDS[state.c][2];
    block.append(marked(entry.x[line].replace(/\s+$/, "") || " "));
    block.append(make("em", "", value === null ? "" : sequential ? plain(value) : signed(value)));
    block.title = `${plain(perToken(entry, one, line), 3)} nats per token over ${entry.n[line]} tokens; ` +
      `p(think) ${plain(one.p[line], 3)}`;
    tint(block, value, scale[state.c], sequential);
    cell.append(block);
    return cell;
  }

  function drawHead(entry, shown) {
    const head = make("div", "rv-row rv-head");
    head.append(make("div"));
    for (const version of shown) {
      const one = rollout(entry, version);
      const cell = make("div");
      cell.append(make("b", "", group().versions[version]));
      const thoughts = one ? Object.keys(one.z).length : 0;
      const reward = one && one.r !== null ? `, reward ${plain(one.r, 4)}` : "";
      cell.append(one ? ` – ${thoughts} thoughts in ${entry.x.length} lines${reward}` : " – not rolled out");
      head.append(cell);
    }
    return head;
  }

  function drawCode(scale) {
    const entry = visible.length ? snippet() : null;
    const pane = part("code");
    if (!entry) {
      pane.replaceChildren(make("div", "rv-none", `No snippet has “${state.q}” in its code or thoughts.`));
      return;
    }
    const shown = [state.l, state.r].filter((v) => v >= 0);
    pane.classList.toggle("two", shown.length === 2);
    const rows = [drawHead(entry, shown)];
    let hidden = 0;
    const flush = () => {
      if (hidden) rows.push(make("div", "rv-gap", `⋯ ${hidden} ${hidden === 1 ? "line" : "lines"}`));
      hidden = 0;
    };
    entry.x.forEach((_, line) => {
      const thinks = shown.some((v) => rollout(entry, v)?.z[line]);
      if (state.t && !thinks) { hidden += 1; return; }
      flush();
      const row = make("div", "rv-row");
      row.append(make("div", "rv-no", String(line + 1)), ...shown.map((v) => drawCell(entry, v, line, scale)));
      rows.push(row);
    });
    flush();
    pane.replaceChildren(...rows);
    const first = pane.querySelector("mark");
    pane.scrollTop = first ? Math.max(0, first.offsetTop - pane.offsetTop - pane.clientHeight / 3) : 0;
  }

  function draw() {
    drawList();
    drawControls();
    const scale = scales();
    drawLegend(scale);
    drawCode(scale);
    const words = Object.entries(state).map(([key, value]) => `${key}=${encodeURIComponent(value)}`);
    if (touched) history.replaceState(null, "", "#rationales?" + words.join("&"));
  }

  // ------------------------------------------------------------------ state and events

  let touched = false;

  // The two versions that a stage is about, the first and the last, and a snippet that has something to show.
  function chooseGroup(number) {
    state.g = number;
    const versions = group().versions.length;
    const thinks = (entry) => Object.values(entry.v).some(([one]) => Object.keys(one.z).length);
    const first = Math.max(0, group().snippets.findIndex(thinks));
    Object.assign(state, { s: first, l: 0, r: versions > 1 ? versions - 1 : -1 });
  }

  function readAddress() {
    const [name, query] = location.hash.split("?");
    if (name !== "#rationales" || !query) return false;
    const given = new URLSearchParams(query);
    const whole = (key, low, high, other) => {
      const value = Number.parseInt(given.get(key) ?? "", 10);
      return value >= low && value <= high ? value : other;
    };
    chooseGroup(whole("g", 0, groups.length - 1, 0));
    state.s = whole("s", 0, group().snippets.length - 1, 0);
    state.l = whole("l", 0, group().versions.length - 1, state.l);
    state.r = whole("r", -1, group().versions.length - 1, state.r);
    state.m = given.get("m") ?? "";
    state.c = LEGENDS[given.get("c")] ? given.get("c") : "gain";
    state.q = given.get("q") ?? "";
    state.t = whole("t", 0, 1, 0);
    return true;
  }

  function listen(name, event, change) {
    part(name).addEventListener(event, (e) => { touched = true; change(e.target); draw(); });
  }

  function move(by) {
    const at = visible.indexOf(state.s);
    const next = visible[Math.min(visible.length - 1, Math.max(0, at + by))];
    if (next === undefined || next === state.s) return;
    state.s = next;
    touched = true;
    draw();
  }

  listen("group", "change", (e) => chooseGroup(Number(e.value)));
  listen("left", "change", (e) => { state.l = Number(e.value); });
  listen("right", "change", (e) => { state.r = Number(e.value); });
  listen("member", "change", (e) => { state.m = e.value; });
  listen("mode", "change", (e) => { state.c = e.value; });
  listen("search", "input", (e) => { state.q = e.value; });
  listen("thoughts", "change", (e) => { state.t = e.checked ? 1 : 0; });
  part("list").addEventListener("click", () => { touched = true; }, true);
  document.getElementById("viewer").addEventListener("keydown", (e) => {
    if (e.target.tagName === "SELECT" || e.altKey || e.ctrlKey || e.metaKey) return;
    const by = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (by) { e.preventDefault(); move(by); }
  });
  window.addEventListener("hashchange", () => { if (readAddress()) draw(); });

  document.getElementById("viewer").hidden = false;
  const addressed = readAddress();
  if (!addressed) chooseGroup(0);
  draw();
  if (addressed) document.getElementById("rationales").scrollIntoView();
})();
