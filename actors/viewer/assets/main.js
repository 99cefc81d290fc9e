// Puts the parts together, and looks for what is new in a run that is served.

const POLL_MS = 2000;

function ago(time) {
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

const clockTime = (time) => time.slice(0, 19).replace("T", " ");

function showFacts(state, run) {
  document.title = `${state.name} · Bascule`;
  byId("run-name").textContent = state.name;
  const steps = state.max_steps ? `step ${state.last_step} of ${state.max_steps}` : `step ${state.last_step}`;
  const facts = [state.algorithm, state.model?.split("/").slice(-2).join("/"), steps, plural(state.num_rollouts, "completion")];
  byId("run-facts").textContent = facts.filter(Boolean).join(" · ");
  byId("run-facts").title = state.directory;
  const damaged = state.unreadable ? ` · ${plural(state.unreadable, "line")} cannot be read` : "";
  const age = run.isLive ? ago(state.changed) : `${clockTime(state.changed)} UTC`;
  byId("run-status").textContent = `${state.status} · last written ${age}${damaged}`;
  byId("run-status").dataset.status = state.status;
}

function showNote(note) {
  if (note === null || note.completions === note.of) return;
  const steps = note.completions ? ` of steps ${note.first_step} to ${note.last_step}` : "";
  byId("note").textContent =
    `This file holds ${note.completions.toLocaleString("en")} of ${plural(note.of, "completion")}, the latest${steps}. `
    + "All curves and events are complete; “bascule view” without --html shows all completions.";
  byId("note").hidden = false;
}

function showEvents(events, choose) {
  const list = byId("event-list");
  if (Number(list.dataset.count) === events.length) return;
  list.dataset.count = events.length;
  byId("event-count").textContent = events.length ? String(events.length) : "";
  const rows = events.toReversed().map((event) =>
    make("li", { "data-kind": event.kind },
      make("button", { type: "button", onclick: () => choose(event.step), title: "show this step's completions" },
        make("span", { class: "head" },
          make("b", {}, event.kind), make("span", { class: "quiet" }, `step ${event.step}`),
          make("time", { datetime: event.time, class: "quiet" }, clockTime(String(event.time)).slice(11))),
        make("span", {}, event.text))));
  list.replaceChildren(...(rows.length ? rows : [make("li", { class: "empty" }, "None were written.")]));
}

async function main() {
  const data = byId("data");
  const run = data ? new WrittenRun(JSON.parse(data.textContent)) : new LiveRun();
  const detail = new Detail();
  const filters = new Filters(() => groups.first());
  const groups = new Groups(run, filters, detail);
  const choose = (step) => {
    filters.chooseStep(step);
    byId("rollouts").scrollIntoView();
  };
  const charts = new Charts(run, choose);
  let state = null;

  const update = async () => {
    const before = state;
    state = await run.state();
    // Another run has taken the directory.
    if (before !== null && before.generation !== state.generation) location.reload();
    showFacts(state, run);
    filters.update(state);
    showEvents(state.events, choose);
    const work = [];
    if (before?.num_rows !== state.num_rows || before?.events.length !== state.events.length) {
      work.push(charts.update(state));
    }
    const grown = before?.num_rollouts !== state.num_rollouts || before?.token_steps.length !== state.token_steps.length;
    if (grown) work.push(groups.load());
    await Promise.all(work);
  };

  followTheme(() => state !== null && charts.draw());
  showNote(run.note);
  await update();
  document.body.dataset.ready = "true";
  while (run.isLive) {
    await new Promise((done) => setTimeout(done, POLL_MS));
    if (document.hidden) continue;
    await update().catch((error) => {
      byId("run-status").textContent = `no answer: ${error.message}; trying again`;
      byId("run-status").dataset.status = "failed";
    });
  }
}

main().catch((error) => {
  byId("run-status").textContent = `this page has failed: ${error.message}`;
  byId("run-status").dataset.status = "failed";
});
