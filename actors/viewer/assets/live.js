// A run that is served: asks for what is shown, and again for what is new.

async function ask(path, parameters = []) {
  const response = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

class LiveRun {
  constructor() {
    this.isLive = true;
    this.note = null;
    this.series = new Map();
  }

  state() {
    return ask("/api/state");
  }

  // Steps and values of these metrics, of which only the new ones are asked for.
  async values(names) {
    for (const name of names) {
      if (!this.series.has(name)) this.series.set(name, { steps: [], values: [] });
    }
    // Addresses have a length: a run may have many metrics.
    for (let first = 0; first < names.length; first += 40) {
      const part = names.slice(first, first + 40);
      const skipped = part.map((name) => this.series.get(name).steps.length);
      const answer = await ask("/api/series", [
        ...part.map((name) => ["name", name]),
        ...skipped.map((count) => ["skip", count]),
      ]);
      answer.forEach((found, position) => {
        const series = this.series.get(found.name);
        // Two calls may have been on their way at once; what one has added is not added again.
        if (series.steps.length !== skipped[position]) return;
        series.steps.push(...found.steps);
        series.values.push(...found.values);
      });
    }
    return names.map((name) => this.series.get(name));
  }

  groups(query, page) {
    return ask("/api/groups", [...Object.entries(query), ["page", page]]);
  }

  group(key) {
    return ask("/api/group", [["key", key]]);
  }
}
