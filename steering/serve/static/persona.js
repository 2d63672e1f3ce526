// The server's `persona` object as this page keeps it in an answer.
//
// One entry a field: `empty` before it is known, `from` reads it from the server's object (a field without `from` is set turn by
// turn), `check` from a stored conversation, where anything may stand. Adding a field to the page is one entry here; turns.js and
// panel.js show them.

export const finite = (value) => (Number.isFinite(value) ? value : null);
const isTrue = (value) => value === true;

export const PERSONA_FIELDS = {
  acted: { empty: false, from: (persona) => typeof persona.arm === "string", check: isTrue }, // an adaptive arm may rest
  projection: { empty: null, from: (persona) => persona.projection ?? null, check: finite },
  z: { empty: null, from: (persona) => persona.z ?? null, check: finite },
  floor: { empty: null, from: (persona) => persona.floor ?? null, check: finite },
  fired: { empty: null, from: (persona) => persona.fired ?? null, check: finite },
  alarm: { empty: false, check: isTrue },
  raised: { empty: false, check: isTrue },
  drift: {
    empty: null,
    from: (persona) => persona.drift?.state ?? null,
    check: (value) => (["calm", "drifting"].includes(value) ? value : null),
  },
  statistic: { empty: null, from: (persona) => persona.drift?.statistic ?? null, check: finite },
};

const entries = Object.entries(PERSONA_FIELDS);
export const emptyPersona = () => Object.fromEntries(entries.map(([name, { empty }]) => [name, empty]));
export const storedPersona = (answer) => Object.fromEntries(entries.map(([name]) => [name, answer[name]]));
export const checkedPersona = (stored) => Object.fromEntries(entries.map(([name, { check }]) => [name, check(stored[name])]));

// Takes over the server's object: into its answer, and into earlier ones that the page does not know yet (a loaded conversation).
export const applyPersona = (answer, persona, answers) => {
  for (const [name, { from }] of entries) if (from) answer[name] = from(persona);
  for (const turn of persona.turns ?? []) {
    const earlier = answers.get(turn.message);
    if (!earlier) continue;
    earlier.projection ??= turn.projection;
    earlier.z ??= turn.z;
    earlier.alarm = turn.alarm === true;
    earlier.raised = turn.raised === true;
  }
};
