"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SHOWN = 40; // rows that a tree shows at first, about
  const LISTED = 600; // rows up to which what was found is unfolded
  const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";

  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const drawn = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const count = (number) => number.toLocaleString("en-US");
  const size = (bytes) => {
    if (bytes < 1000) return `${bytes} bytes`;
    for (const unit of ["kB", "MB", "GB", "TB"]) {
      bytes /= 1000;
      if (bytes < 999.95) return `${bytes.toFixed(1)} ${unit}`;
    }
    return `${(bytes / 1000).toFixed(1)} PB`;
  };

  // -- histograms

  const path = (heights, width, height, closed) => {
    const step = width / heights.length;
    let made = `M0 ${height}`;
    [...heights].forEach((digit, at) => {
      made += `V${(height - (DIGITS.indexOf(digit) / 63) * height).toFixed(1)}H${((at + 1) * step).toFixed(1)}`;
    });
    return made + `V${height}` + (closed ? "Z" : "");
  };
  const histogram = ([low, high, ...sides], width, height) => {
    const made = drawn("svg", { class: "spark", viewBox: `0 -1 ${width} ${height + 1}`, preserveAspectRatio: "none",
      role: "img", "aria-label": `Histogram from ${low} to ${high}` });
    const [first, second] = sides;
    made.append(drawn("path", { class: "bar", d: path(second || first, width, height, true) }));
    if (second) made.append(drawn("path", { class: "first", d: path(first, width, height, false) }));
    return made;
  };

  // -- trees

  class Tree {
    constructor(box, given) {
      Object.assign(this, given);
      this.box = box;
      this.entries = this.rows.map(([key, status, cells, facts, bars, counted = 1]) => ({ key, status, cells, facts, bars, counted,
        lower: key.toLowerCase() }));
      this.hasBars = this.entries.some((entry) => entry.bars);
      this.pressed = null;
      this.build();
      this.show();
    }

    build() {
      const bar = make("div", "bar-row");
      this.input = make("input");
      Object.assign(this.input, { type: "search", placeholder: "Search keys: words, or a glob such as *.bias",
        autocomplete: "off", spellcheck: false });
      this.input.setAttribute("aria-label", "Search keys");
      let waiting;
      this.input.addEventListener("input", () => {
        clearTimeout(waiting);
        waiting = setTimeout(() => this.show(), 60);
      });
      this.said = make("span", "count");
      this.said.setAttribute("role", "status");
      const unfold = make("button", "", "Unfold all");
      const fold = make("button", "", "Fold all");
      for (const button of [unfold, fold]) button.type = "button";
      unfold.addEventListener("click", () => this.unfold(true));
      fold.addEventListener("click", () => this.unfold(false));
      bar.append(this.input, unfold, fold, this.said);
      this.grid = make("div", "grid");
      this.grid.style.setProperty("--columns", this.widths());
      this.grid.addEventListener("keydown", (event) => this.move(event));
      this.box.append(bar, ...this.chips(), this.grid);
    }

    chips() {
      const there = this.statuses.map(([title, mark], at) => [title, mark, at,
        this.entries.filter((entry) => entry.status === at).length]).filter(([title, , , number]) => title && number);
      if (!there.length) return [];
      const bar = make("div", "bar-row");
      for (const [title, mark, at, number] of there) {
        const chip = make("button", "chip");
        chip.type = "button";
        chip.append(make("i", `swatch ${mark}`), `${title} ${count(number)}`);
        chip.setAttribute("aria-pressed", "false");
        chip.addEventListener("click", () => {
          this.pressed = this.pressed === at ? null : at;
          for (const other of bar.children) other.setAttribute("aria-pressed", String(other === chip && this.pressed === at));
          this.show();
        });
        bar.append(chip);
      }
      return [bar];
    }

    widths() {
      const found = this.columns.map(([title, kind], at) => {
        if (kind === "count" || kind === "bytes") return kind === "count" ? "minmax(7.2rem, max-content)" : "5.6rem";
        const longest = Math.max(title.length, ...this.entries.map((entry) => this.texts[entry.cells[at]].length));
        return kind === "measure" ? "5.6rem" : longest > 26 ? "minmax(0, 1fr)" : `${Math.max(longest * 0.9, 4)}ch`;
      });
      return ["minmax(11rem, 1.6fr)", ...(this.hasBars ? ["64px"] : []), ...found].join(" ");
    }

    terms() {
      return this.input.value.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
        if (!word.includes("*")) return (key) => key.includes(word);
        const glob = new RegExp(`^${word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*")}$`);
        return (key) => glob.test(key);
      });
    }

    show() {
      const terms = this.terms();
      const found = this.entries.filter((entry) => (this.pressed === null || entry.status === this.pressed)
        && terms.every((term) => term(entry.lower)));
      const isAll = !terms.length && this.pressed === null;
      this.said.textContent = isAll ? `${count(found.length)} keys` : `${count(found.length)} of ${count(this.entries.length)} keys`;
      this.root = this.module(found);
      this.grid.replaceChildren(this.headers());
      if (!found.length) this.grid.append(make("p", "none", "no key"));
      this.fill(this.grid, this.root, 0);
      if (isAll) this.unfoldFirst();
      else if (found.length <= LISTED) this.unfold(true);
    }

    headers() {
      const row = make("div", "row headers");
      row.append(make("span", "name", "key"), ...(this.hasBars ? [make("span", "", "values")] : []),
        ...this.columns.map(([title, kind]) => make("span", kind === "text" ? "" : "n", title)));
      return row;
    }

    // the modules of some entries; those with a single module in them are one with it
    module(entries) {
      const root = { name: "", items: [], below: new Map(), sums: this.columns.map(() => 0), keys: 0, states: new Map() };
      for (const entry of entries) {
        const parts = entry.key.split(".");
        let node = root;
        this.add(node, entry);
        for (const part of parts.slice(0, -1)) {
          if (!node.below.has(part)) {
            const made = { name: part, items: [], below: new Map(), sums: this.columns.map(() => 0), keys: 0, states: new Map() };
            node.below.set(part, made);
            node.items.push(made);
          }
          node = node.below.get(part);
          this.add(node, entry);
        }
        node.items.push({ entry, name: parts[parts.length - 1] });
      }
      const shortened = (node) => {
        node.items = node.items.map((item) => {
          while (!item.entry && item.items.length === 1 && !item.items[0].entry) {
            item.items[0].name = `${item.name}.${item.items[0].name}`;
            item = item.items[0];
          }
          if (!item.entry && item.items.length === 1) return { ...item.items[0], name: `${item.name}.${item.items[0].name}` };
          return item.entry ? item : shortened(item);
        });
        return node;
      };
      return shortened(root);
    }

    add(node, entry) {
      node.keys += 1;
      node.states.set(entry.status, (node.states.get(entry.status) || 0) + 1);
      this.columns.forEach(([, kind], at) => {
        if ((kind === "count" || kind === "bytes") && entry.counted) node.sums[at] += entry.cells[at];
      });
    }

    fill(box, node, depth) {
      for (const item of node.items) box.append(item.entry ? this.leaf(item, depth) : this.branch(item, depth));
    }

    branch(node, depth) {
      const made = make("details", "module");
      const summary = make("summary");
      const row = make("div", "row");
      const name = make("span", "name", node.name);
      const states = [...node.states].sort(([a], [b]) => a - b).filter(([at]) => this.statuses[at][0] && this.statuses[at][1] !== "good");
      for (const [at, number] of states) name.append(make("span", `state ${this.statuses[at][1]}`, `${count(number)} ${this.statuses[at][0]}`));
      row.append(name, ...(this.hasBars ? [make("span")] : []));
      let said = false;
      this.columns.forEach(([, kind], at) => {
        if (kind === "count") row.append(make("span", "n", count(node.sums[at])));
        else if (kind === "bytes") row.append(make("span", "n", size(node.sums[at])));
        else row.append(make("span", kind === "measure" ? "n" : "", said ? "" : `${count(node.keys)} ${node.keys === 1 ? "key" : "keys"}`));
        said = said || kind === "text";
      });
      summary.append(row);
      summary.style.setProperty("--depth", depth);
      made.append(summary);
      made.fillIn = () => {
        if (made.childElementCount === 1) this.fill(made, node, depth + 1);
      };
      made.addEventListener("toggle", () => made.open && made.fillIn());
      return made;
    }

    leaf({ entry, name }, depth) {
      const row = make("div", "row");
      const title = make("span", "name");
      title.title = entry.key;
      title.append(...this.highlighted(name));
      const [state, mark] = this.statuses[entry.status];
      if (state && mark !== "good") title.append(make("span", `state ${mark}`, state));
      row.append(title);
      if (this.hasBars) {
        const cell = make("span");
        if (entry.bars) cell.append(histogram(entry.bars, 64, 14));
        row.append(cell);
      }
      this.columns.forEach(([, kind], at) => {
        const value = entry.cells[at];
        const text = kind === "count" ? count(value) : kind === "bytes" ? size(value) : this.texts[value];
        const cell = make("span", kind === "text" ? "" : "n", text);
        if (kind === "text" && text.length > 20) cell.title = text;
        row.append(cell);
      });
      if (!entry.facts && !entry.bars) {
        const made = make("div", "leaf");
        made.style.setProperty("--depth", depth);
        made.append(row);
        return made;
      }
      const made = make("details", "leaf");
      const summary = make("summary");
      made.style.setProperty("--depth", depth);
      summary.append(row);
      made.append(summary);
      made.addEventListener("toggle", () => made.open && made.childElementCount === 1 && made.append(this.detail(entry)));
      return made;
    }

    highlighted(name) {
      const word = this.input.value.toLowerCase().split(/\s+/).filter((term) => term && !term.includes("*"))
        .find((term) => name.toLowerCase().includes(term));
      if (!word) return [name];
      const at = name.toLowerCase().indexOf(word);
      return [name.slice(0, at), make("mark", "", name.slice(at, at + word.length)), name.slice(at + word.length)];
    }

    detail(entry) {
      const made = make("div", "detail");
      made.append(make("div", "key", entry.key));
      if (entry.bars) {
        const range = make("div", "range");
        range.append(make("span", "", entry.bars[0]), make("span", "", entry.bars[1]));
        made.append(histogram(entry.bars, 400, 88), range);
      }
      const list = make("dl");
      (entry.facts || []).forEach((fact, at) => {
        if (!fact) return;
        const pair = make("div");
        pair.append(make("dt", "", this.details[at]), make("dd", "", fact));
        list.append(pair);
      });
      made.append(list);
      return made;
    }

    unfold(open) {
      if (open) {
        for (let left; (left = this.grid.querySelectorAll("details.module:not([open])")).length;) {
          for (const one of left) {
            one.fillIn();
            one.open = true;
          }
        }
      } else for (const one of this.grid.querySelectorAll("details[open]")) one.open = false;
    }

    // open modules from the top, as long as about as many rows are seen as fit a screen
    unfoldFirst() {
      let seen = this.root.items.length;
      const waiting = [...this.grid.querySelectorAll(":scope > details.module")];
      const nodes = this.root.items.filter((item) => !item.entry);
      while (waiting.length) {
        const one = waiting.shift();
        const node = nodes.shift();
        if (seen + node.items.length > SHOWN && seen > 1) continue;
        seen += node.items.length;
        one.fillIn();
        one.open = true;
        waiting.push(...one.querySelectorAll(":scope > details.module"));
        nodes.push(...node.items.filter((item) => !item.entry));
      }
    }

    // arrow keys go through what is seen, and fold
    move(event) {
      const now = event.target.closest("summary");
      if (!now || event.target.tagName === "INPUT") return;
      const seen = [...this.grid.querySelectorAll("summary")].filter((one) => one.checkVisibility());
      const at = seen.indexOf(now);
      const box = now.parentElement;
      const steps = { ArrowDown: () => seen[at + 1], ArrowUp: () => seen[at - 1], Home: () => seen[0], End: () => seen[seen.length - 1] };
      if (event.key === "ArrowRight") box.open = true;
      else if (event.key === "ArrowLeft" && box.open) box.open = false;
      else if (event.key === "ArrowLeft") box.parentElement.closest("details")?.querySelector("summary").focus();
      else if (steps[event.key]) steps[event.key]()?.focus();
      else return;
      event.preventDefault();
    }

    search(text) {
      this.input.value = text;
      this.show();
      this.box.scrollIntoView({ block: "start" });
      this.input.focus({ preventScroll: true });
    }
  }
  const trees = [...document.querySelectorAll("[data-tree]")].map((box) => new Tree(box, data.trees[Number(box.dataset.tree)]));

  // -- what is told of the thing under the pointer

  const tip = document.getElementById("tip");
  const tell = (text, x, y) => {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
  };
  for (const map of document.querySelectorAll("svg.heat")) map.querySelectorAll("rect").forEach((rect, at) => (rect.dataset.i = at));
  const measured = (key) => {
    const tree = trees[0];
    tree.byKey ||= new Map(tree.entries.map((entry) => [entry.key, entry]));
    const entry = tree.byKey.get(key);
    if (!entry) return "";
    const facts = (entry.facts || []).slice(0, 2).map((fact, at) => `, ${tree.details[at]} ${fact}`);
    return `${tree.columns[0][0]} ${tree.texts[entry.cells[0]]}${facts.join("")}`;
  };
  const cellAt = (rect) => {
    const svg = rect.closest("svg");
    const panel = data.heat[Number(svg.parentElement.dataset.map)][Number(svg.dataset.panel)];
    const [row, column, said] = panel.cells[Number(rect.dataset.i)];
    return { row, column, text: `${panel.rows[row]} · ${panel.columns[column]}: ${said || measured(`${panel.rows[row]}.${panel.columns[column]}`)}` };
  };
  document.addEventListener("pointermove", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const cell = target?.closest("rect[data-i]");
    const box = target?.closest("[data-tip]");
    tell(cell ? cellAt(cell).text : box ? box.dataset.tip : "", event.clientX, event.clientY);
  });
  document.addEventListener("pointerleave", () => tell(""));
  document.addEventListener("scroll", () => tell(""), { passive: true, capture: true });

  for (const map of document.querySelectorAll("svg.treemap")) {
    map.addEventListener("click", (event) => {
      const tile = event.target.closest("[data-path]");
      const section = map.closest("section");
      const tree = trees.find((one) => section.compareDocumentPosition(one.box) & Node.DOCUMENT_POSITION_FOLLOWING) || trees[0];
      if (tile && tree) tree.search(tile.dataset.path);
    });
  }

  // -- heat maps by the keyboard

  for (const map of document.querySelectorAll("svg.heat")) {
    const cells = [...map.querySelectorAll("rect[data-i]")].map((rect) => ({ rect, ...cellAt(rect) }));
    let now = null;
    const go = (cell) => {
      now?.rect.classList.remove("at");
      now = cell;
      if (!cell) return tell("");
      cell.rect.classList.add("at");
      const box = cell.rect.getBoundingClientRect();
      tell(cell.text, box.left, box.top);
    };
    const nearest = (rows, columns) => cells
      .filter((one) => (rows ? Math.sign(one.row - now.row) === rows : one.row === now.row)
        && (columns ? Math.sign(one.column - now.column) === columns : true))
      .sort((a, b) => Math.abs(a.row - now.row) * 100 + Math.abs(a.column - now.column)
        - Math.abs(b.row - now.row) * 100 - Math.abs(b.column - now.column))[0];
    map.addEventListener("focus", () => map.matches(":focus-visible") && go(now || cells[0]));
    map.addEventListener("blur", () => go(null));
    map.addEventListener("keydown", (event) => {
      const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
      if (!step) return;
      event.preventDefault();
      go(now ? nearest(...step) || now : cells[0]);
    });
  }

  // -- copying

  for (const button of document.querySelectorAll("button.copy")) {
    const text = button.parentElement.querySelector("pre");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
      } catch {
        getSelection().selectAllChildren(text);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
})();
