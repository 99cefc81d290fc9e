// One group with its completions, token by token where they were written.

const AT_ONCE = 16;
const KINDS = {
  advantage: { text: "advantage", floor: 0.5, of: (record) => record.tokens.map(() => record.advantage) },
  mismatch: {
    text: "mismatch, trainer − engine, nats", floor: 0.02,
    of: (record) => record.tokens.map((_, i) => minus(record.trainer_logprobs[i], record.logprobs[i])),
  },
  ratio: {
    text: "log of ratio, updated − trainer, nats", floor: 0.02,
    of: (record) => record.tokens.map((_, i) => minus(record.updated_logprobs[i], record.trainer_logprobs[i])),
  },
};

const minus = (one, other) => (one === null || other === null ? null : one - other);

// Where colours are full: what 99 in 100 tokens of the group stay below, so that one outlier does not pale the rest.
function scaleOf(kind, records) {
  const sizes = records.flatMap((record) => KINDS[kind].of(record)).filter((value) => value !== null).map(Math.abs);
  sizes.sort((one, other) => one - other);
  return Math.max(KINDS[kind].floor, sizes[Math.min(sizes.length - 1, Math.floor(0.99 * sizes.length))] ?? 0);
}

// Blue above zero, orange below, nothing at zero.
function tint(value, scale) {
  if (value === null || value === 0) return "";
  const share = Math.min(1, Math.abs(value) / scale);
  return `rgb(var(--${value > 0 ? "above" : "below"}) / ${(0.5 * share).toFixed(3)})`;
}

class Detail {
  constructor() {
    this.area = byId("detail");
    this.kind = remembered("token colours") ?? "advantage";
    this.order = "index";
    this.onlyMatching = true;
    this.group = null;
    const tip = (event) => this.tip(event.target.closest?.(".token"), event);
    this.area.addEventListener("mouseover", tip);
    this.area.addEventListener("mouseleave", () => (byId("tip").hidden = true));
  }

  clear() {
    this.group = null;
    delete this.area.dataset.key;
    this.area.replaceChildren(make("p", { class: "empty" }, "No completion is as the filter asks."));
  }

  show(group, matching) {
    this.group = group;
    this.matching = new Set(matching);
    this.draw();
    this.area.dataset.key = group.key;
    this.area.scrollTop = 0;
  }

  // The same group under another filter.
  match(matching) {
    const same = matching.length === this.matching?.size && matching.every((index) => this.matching.has(index));
    if (same || !this.group) return;
    this.matching = new Set(matching);
    this.draw();
  }

  draw() {
    const { group } = this;
    const records = group.completions.map((each) => each.record).filter((record) => record !== null);
    this.isRecorded = records.length > 0;
    this.scale = this.isRecorded && this.kind !== "none" ? scaleOf(this.kind, records) : 1;
    const messages = group.messages.map((message) =>
      make("div", { class: "message" }, make("b", {}, message.role), make("p", {}, message.content)));
    const shown = group.completions.filter((each) => !this.onlyMatching || this.matching.has(each.index));
    shown.sort((one, other) => this.compare(one, other));
    this.left = shown;
    this.cards = make("div", { class: "cards" });
    this.area.replaceChildren(
      make("h3", {}, `Step ${group.step}`, make("small", {}, ` ${group.split} · ${group.prompt_id}`)),
      ...messages,
      this.tools(),
      this.cards,
    );
    this.more();
  }

  compare(one, other) {
    if (this.order === "reward") return (other.reward ?? -Infinity) - (one.reward ?? -Infinity) || one.index - other.index;
    if (this.order === "length") return other.tokens - one.tokens || one.index - other.index;
    return one.index - other.index;
  }

  tools() {
    const choice = (label, values, value, changed, disabled = false) => {
      const select = make("select", { disabled, onchange: (event) => changed(event.target.value) });
      select.append(...values.map(([name, text]) => make("option", { value: name }, text)));
      select.value = value;
      return make("label", { class: "inline" }, label, " ", select);
    };
    const again = (name) => (value) => {
      this[name] = value;
      if (name === "kind") remember("token colours", value);
      this.draw();
      this.area.querySelector(`select[data-name=${name}]`)?.focus();
    };
    const kinds = [["advantage", "advantage"], ["mismatch", "mismatch"], ["ratio", "ratio"], ["none", "none"]];
    const colours = choice("Token colours", kinds, this.kind, again("kind"), !this.isRecorded);
    colours.querySelector("select").dataset.name = "kind";
    const order = choice(
      "Order", [["index", "as sampled"], ["reward", "reward"], ["length", "length"]], this.order, again("order"));
    order.querySelector("select").dataset.name = "order";
    const hidden = this.group.completions.length - this.matching.size;
    const box = make("input", { type: "checkbox", onchange: (event) => again("onlyMatching")(!event.target.checked) });
    box.checked = !this.onlyMatching;
    const all = make("label", { class: "inline" }, box, ` Also the ${plural(hidden, "other")}`);
    return make("div", { class: "tools" }, colours, order, hidden ? all : null, this.legend());
  }

  legend() {
    if (!this.isRecorded) {
      return make("span", { class: "quiet" }, "No tokens of this group were recorded: they are for what is trained on, in steps of record.token_steps.");
    }
    if (this.kind === "none") return null;
    const text = show(this.scale);
    return make(
      "span", { class: "scale", "data-scale": this.scale }, `−${text}`, make("i", { "aria-hidden": "true" }), `+${text} `,
      make("span", { class: "quiet" }, KINDS[this.kind].text));
  }

  // The next completions: a group may be large, and each has a box for every token.
  more() {
    const next = this.left.slice(0, AT_ONCE);
    this.left = this.left.slice(AT_ONCE);
    this.cards.append(...next.map((completion) => this.card(completion)));
    if (this.left.length) {
      const next = () => {
        button.remove();
        this.more();
      };
      const text = `Show the next ${Math.min(AT_ONCE, this.left.length)} of ${this.left.length}`;
      const button = make("button", { type: "button", onclick: next }, text);
      this.cards.append(button);
    }
  }

  card(completion) {
    const { record } = completion;
    const parts = Object.entries(completion.rewards).map(([name, value]) =>
      make("span", { class: "part" }, `${name} `, make("b", {}, show(value))));
    const [oldest, newest] = completion.weight_versions ?? [null, null];
    const versions = oldest === newest ? oldest : `${oldest}–${newest}`;
    return make(
      "section",
      {
        class: this.matching.has(completion.index) ? "card" : "card other",
        "data-index": completion.index,
        "aria-label": `Completion ${completion.index}`,
      },
      make(
        "p", { class: "head" },
        make("b", { class: "number" }, `#${completion.index}`),
        make("span", { class: "reward" }, "reward ", make("b", {}, show(completion.reward))),
        ...parts,
        record ? make("span", { class: "part advantage" }, "advantage ", make("b", {}, show(record.advantage))) : null,
        make("span", { class: "quiet end" },
          completion.finish === "stop" ? null : make("em", { class: completion.finish }, completion.finish),
          ` ${completion.tokens} tok${oldest === null ? "" : ` · weights ${versions}`}`),
      ),
      this.text(completion),
    );
  }

  text(completion) {
    const { record } = completion;
    if (record === null || this.kind === "none") return make("pre", { tabindex: 0 }, completion.completion);
    const values = KINDS[this.kind].of(record);
    const tokens = record.tokens.map((text, i) => {
      // A line's end has a colour as well.
      const token = make("span", { class: "token", "data-i": i }, text.replaceAll("\n", "↵\n"));
      token.style.backgroundColor = tint(values[i], this.scale);
      return token;
    });
    return make("pre", { tabindex: 0 }, ...tokens);
  }

  tip(token, event) {
    const tip = byId("tip");
    tip.hidden = !token;
    if (!token) return;
    const index = Number(token.closest(".card").dataset.index);
    const { record } = this.group.completions.find((each) => each.index === index);
    const i = Number(token.dataset.i);
    const [engine, trainer, updated] = [record.logprobs[i], record.trainer_logprobs[i], record.updated_logprobs[i]];
    const change = minus(updated, trainer);
    const rows = [
      ["token", JSON.stringify(record.tokens[i])],
      ["advantage", show(record.advantage)],
      ["engine", show(engine)],
      ["trainer", show(trainer)],
      ["updated", show(updated)],
      ["mismatch", show(minus(trainer, engine))],
      ["ratio", change === null ? "–" : Math.exp(change).toFixed(4)],
    ];
    tip.replaceChildren(...rows.flatMap(([name, value]) => [make("span", {}, name), make("b", {}, value)]));
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.min(event.clientX + 12, room)}px`;
    const below = event.clientY + 16;
    const fits = below + tip.offsetHeight < document.documentElement.clientHeight;
    tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 12}px`;
  }
}
