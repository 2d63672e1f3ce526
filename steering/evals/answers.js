// The answers of an evaluation, filtered by suite, category, arm and how the arm's outcome changed. Texts are set as text.
(() => {
  const { arms, cases } = JSON.parse(document.getElementById("answers-data").textContent);
  const list = document.getElementById("cases");
  if (!list) return;
  const form = document.getElementById("filters");
  const more = document.getElementById("more");
  const count = document.getElementById("count");
  const [suite, category, arm, change, find] = ["suite", "category", "arm", "change", "words"].map((name) => form.elements[name]);
  const page = 10;
  let shown = page;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const fill = (select, names, every) => {
    const before = select.value;
    select.replaceChildren(...[...(every ? [""] : []), ...names].map((name) => new Option(name || every, name)));
    if (names.includes(before)) select.value = before;
  };
  const categories = () => {
    const own = cases.filter((one) => !suite.value || one.suite === suite.value);
    fill(category, [...new Set(own.map((one) => one.category).filter(Boolean))].sort(), "all categories");
    category.closest("label").hidden = category.options.length < 3;
  };
  const matches = (one) => {
    const words = find.value.trim().toLowerCase();
    const own = one.changes[arm.value] ?? "";
    return (
      (!suite.value || one.suite === suite.value) &&
      (!category.value || one.category === category.value) &&
      (!change.value || own === change.value || (change.value === "changed" && own)) &&
      (!words || JSON.stringify([one.users, one.role, one.arms]).toLowerCase().includes(words))
    );
  };
  const answer = (name, turn, marked) => {
    const box = element("div", marked ? "answer marked" : "answer");
    box.append(element("p", "question", name));
    const text = element("blockquote", "", turn ? turn.text || "(an empty answer)" : "(no answer)");
    text.dir = "auto";
    const chips = element("p", "chips");
    for (const tag of turn ? turn.tags : []) chips.append(element("span", "", tag));
    if (turn && turn.projection !== null) chips.append(element("span", "", `projection ${turn.projection}`));
    box.append(text, chips);
    return box;
  };
  const draw = () => {
    const found = cases.filter(matches);
    count.textContent = `${found.length} of ${cases.length} cases`;
    more.hidden = found.length <= shown;
    list.replaceChildren(
      ...found.slice(0, shown).map((one) => {
        const article = element("article", "sample case");
        const about = [one.suite, one.role, one.category].filter(Boolean).join(" · ");
        const own = one.changes[arm.value];
        article.append(element("p", "eyebrow", own ? `${about} · ${own} with ${arm.value}` : about));
        one.users.forEach((user, turn) => {
          const line = element("p", "system", user);
          line.dir = "auto";
          const pair = element("div", arm.value === arms[0] ? "single" : "pair");
          pair.append(answer(arms[0], one.arms[arms[0]][turn], false));
          if (arm.value !== arms[0]) pair.append(answer(arm.value, one.arms[arm.value][turn], true));
          article.append(line, pair);
        });
        return article;
      }),
    );
  };
  fill(suite, [...new Set(cases.map((one) => one.suite))], "all suites");
  suite.closest("label").hidden = suite.options.length < 3;
  fill(arm, arms.length > 1 ? arms.slice(1) : arms);
  arm.closest("label").hidden = arms.length < 3;
  change.closest("label").hidden = arms.length < 2;
  categories();
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target === suite) categories();
    shown = page;
    draw();
  });
  more.addEventListener("click", () => {
    shown += page;
    draw();
  });
  draw();
})();
