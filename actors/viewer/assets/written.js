// A run that is in this file. Filter and order are those of actors/viewer/query.py.

const GROUPS_ON_A_PAGE = 40;

const valueOf = (completion, name) => (name ? (completion.rewards[name] ?? null) : completion.reward);

function within(value, low, high) {
  return (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
}

function contains(group, completion, text) {
  const texts = [completion.completion, ...group.messages.map((message) => message.content)];
  return texts.some((each) => each.toLowerCase().includes(text));
}

function isAskedFor(group, completion, query) {
  if (query.finish && completion.finish !== query.finish) return false;
  if (query.recorded && completion.record === null) return false;
  if (query.function || query.low !== "" || query.high !== "") {
    const value = valueOf(completion, query.function);
    if (value === null || !within(value, query.low, query.high)) return false;
  }
  return !query.text || contains(group, completion, query.text.toLowerCase());
}

// A number to sort by, the lowest first; groups without any value are last.
function rank(match, query) {
  const lengths = match.completions.map((completion) => completion.tokens);
  if (query.sort === "longest") return -Math.max(...lengths);
  if (query.sort === "shortest") return Math.min(...lengths);
  const values = knownValues(match, query);
  const middle = mean(values);
  if (middle === null) return Infinity;
  if (query.sort === "highest") return -middle;
  if (query.sort === "lowest") return middle;
  return -mean(values.map((value) => (value - middle) ** 2));
}

function knownValues(match, query) {
  const values = match.completions.map((completion) => valueOf(completion, query.function));
  return values.filter((value) => value !== null);
}

function summary(match, query) {
  const { group, completions } = match;
  return {
    key: group.key,
    step: group.step,
    split: group.split,
    prompt_id: group.prompt_id,
    prompt: (group.messages.at(-1)?.content ?? "").slice(0, 200),
    values: group.completions.map((completion) => valueOf(completion, query.function)),
    matching: completions.map((completion) => completion.index),
    mean: mean(knownValues(match, query)),
    tokens: mean(completions.map((completion) => completion.tokens)),
    recorded: completions.some((completion) => completion.record !== null),
  };
}

class WrittenRun {
  constructor(data) {
    this.isLive = false;
    this.note = data.note;
    this.data = data;
    this.series = new Map(data.series.map((series) => [series.name, series]));
    this.byKey = new Map(data.groups.map((group) => [group.key, group]));
  }

  async state() {
    return this.data.state;
  }

  async values(names) {
    return names.map((name) => this.series.get(name));
  }

  async groups(query, page) {
    const found = this.select(query);
    const pages = Math.max(1, Math.ceil(found.length / GROUPS_ON_A_PAGE));
    const shown = Math.min(page, pages - 1);
    const part = found.slice(shown * GROUPS_ON_A_PAGE, (shown + 1) * GROUPS_ON_A_PAGE);
    return {
      num_groups: found.length,
      num_completions: found.reduce((sum, match) => sum + match.completions.length, 0),
      page: shown,
      pages,
      groups: part.map((match) => summary(match, query)),
    };
  }

  select(query) {
    const found = [];
    for (const group of this.data.groups) {
      if (query.split && group.split !== query.split) continue;
      if (!within(group.step, query.first_step, query.last_step)) continue;
      const completions = group.completions.filter((completion) => isAskedFor(group, completion, query));
      if (completions.length) found.push({ group, completions });
    }
    if (query.sort === "oldest") return found;
    found.sort((one, other) => other.group.step - one.group.step);
    if (query.sort === "newest") return found;
    const ranks = new Map(found.map((match) => [match, rank(match, query)]));
    return found.sort((one, other) => {
      const [a, b] = [ranks.get(one), ranks.get(other)];
      return a === b ? 0 : a < b ? -1 : 1;
    });
  }

  async group(key) {
    return this.byKey.get(key);
  }
}
