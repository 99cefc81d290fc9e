// The list of groups, and the one that is chosen.

class Groups {
  constructor(run, filters, detail) {
    this.run = run;
    this.filters = filters;
    this.detail = detail;
    this.page = 0;
    this.asked = 0;
    this.chosen = null;
    this.list = byId("groups");
    byId("previous-page").addEventListener("click", () => this.turn(-1));
    byId("next-page").addEventListener("click", () => this.turn(1));
    this.list.addEventListener("keydown", (event) => this.key(event));
  }

  async turn(pages) {
    this.page += pages;
    await this.load();
    this.list.scrollTop = 0;
  }

  first() {
    this.page = 0;
    return this.load();
  }

  // Ask for the page again; the chosen group stays, or the first one is chosen.
  async load() {
    const asked = ++this.asked;
    const { query } = this.filters;
    const answer = await this.run.groups(query, this.page).catch((error) => ({ error }));
    // A later question has been asked meanwhile.
    if (asked !== this.asked) return;
    if (answer.error) {
      byId("found").textContent = answer.error.message;
      return;
    }
    this.page = answer.page;
    this.rows = answer.groups;
    this.fill(answer);
    const kept = this.rows.find((row) => row.key === this.chosen);
    if (kept) this.detail.match(kept.matching);
    else await this.choose(this.rows[0]?.key ?? null);
    // What the list is the answer to.
    this.list.dataset.query = JSON.stringify(query);
  }

  fill(answer) {
    const { num_groups, num_completions, page, pages } = answer;
    byId("found").textContent = `${plural(num_completions, "completion")} in ${plural(num_groups, "group")}`;
    byId("page-number").textContent = `${page + 1} of ${pages.toLocaleString("en")}`;
    byId("previous-page").disabled = page === 0;
    byId("next-page").disabled = page + 1 >= pages;
    const values = this.rows.flatMap((row) => row.values).filter((value) => value !== null);
    const scale = { low: Math.min(...values), high: Math.max(...values) };
    const focused = this.list.contains(document.activeElement);
    this.list.replaceChildren(...this.rows.map((row) => make("li", {}, this.button(row, scale))));
    if (focused) this.list.querySelector("[aria-current]")?.focus();
  }

  button(row, scale) {
    const matching = new Set(row.matching);
    const chips = row.values.slice(0, 64).map((value, index) => {
      const share = value === null ? 0 : scale.high > scale.low ? (value - scale.low) / (scale.high - scale.low) : 1;
      const chip = make("i", { class: matching.has(index) ? "" : "other", title: `#${index}: ${show(value)}` });
      chip.style.setProperty("--share", share.toFixed(3));
      if (value === null) chip.classList.add("none");
      return chip;
    });
    const some = row.matching.length < row.values.length ? `${row.matching.length} of ` : "";
    return make(
      "button",
      {
        type: "button",
        "data-key": row.key,
        "aria-current": row.key === this.chosen ? "true" : null,
        onclick: () => this.choose(row.key),
      },
      make(
        "span", { class: "head" },
        make("b", {}, `step ${row.step}`),
        make("span", { class: "quiet" }, `${row.split} · ${row.prompt_id}`),
        make("span", { class: "value" }, show(row.mean)),
      ),
      make("span", { class: "prompt" }, row.prompt),
      make(
        "span", { class: "foot" },
        make("span", { class: "chips", "aria-hidden": "true" }, ...chips),
        make("span", { class: "quiet" },
          `${some}${plural(row.values.length, "completion")} · ${show(Math.round(row.tokens))} tok`
          + `${row.recorded ? " · recorded" : ""}`),
      ),
    );
  }

  async choose(key) {
    this.chosen = key;
    for (const button of this.list.querySelectorAll("button")) {
      if (button.dataset.key === key) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    if (key === null) {
      this.detail.clear();
      return;
    }
    const group = await this.run.group(key);
    if (this.chosen !== key) return;
    this.detail.show(group, this.rows.find((row) => row.key === key)?.matching ?? []);
  }

  // Arrows go through the list.
  key(event) {
    const down = event.key === "ArrowDown" || event.key === "j";
    if (!down && event.key !== "ArrowUp" && event.key !== "k") return;
    event.preventDefault();
    const buttons = [...this.list.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + (down ? 1 : -1)];
    if (!next) return;
    next.focus();
    this.choose(next.dataset.key);
  }
}
