// The form above the list.

const DEFAULTS = {
  text: "", split: "", first_step: "", last_step: "", function: "", low: "", high: "", finish: "", recorded: "",
  sort: "newest",
};

class Filters {
  // `changed` is called a moment after the last change.
  constructor(changed) {
    this.form = byId("filters");
    let waiting = 0;
    const soon = () => {
      clearTimeout(waiting);
      waiting = setTimeout(changed, 150);
    };
    this.form.addEventListener("input", soon);
    // The fields are empty only after the event.
    this.form.addEventListener("reset", soon);
    this.form.addEventListener("submit", (event) => event.preventDefault());
  }

  get query() {
    return { ...DEFAULTS, ...Object.fromEntries(new FormData(this.form)) };
  }

  update(state) {
    offer(this.form.elements.split, state.splits);
    offer(this.form.elements.function, state.functions);
    offer(this.form.elements.finish, state.finishes);
    const { recorded } = this.form.elements;
    recorded.disabled = !state.token_steps.length;
    recorded.parentElement.title = state.token_steps.length
      ? `tokens were written at steps ${state.token_steps.join(", ")}`
      : "no tokens were written; see record.token_steps";
  }

  // Only the completions of this step.
  chooseStep(step) {
    this.form.elements.first_step.value = step;
    this.form.elements.last_step.value = step;
    this.form.dispatchEvent(new Event("input"));
  }
}
