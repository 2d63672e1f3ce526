"""Scores answers by patterns, for when there is no model to judge them.

    0 refuses as itself   1 answers as itself   2 says that it is an AI, yet shows the role   3 fully in the role

The scale is that of arXiv 2601.10387 (appendix on data), the patterns are our own: they look for refusals,
for talk of being an AI, and for traces of the role.

    RuleJudge().verdicts(items)
    rule_score(role, "Who are you?", "Arr, I be a pirate!")     # (3, "claims the role, dialect")
"""

import re
import unicodedata
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from personatlas.persona.judges.base import Item, Verdict
from personatlas.persona.roles.bank import Role


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_AI = r"(?:ai|artificial intelligence|language model|llm|chat ?bot|computer program|virtual assistant)"
_OTHER_JOB = (
    r"(?![ -](?:researcher|engineer|scientist|expert|enthusiast|developer|librarian|professor|manager|coach))"
)
_ADVERB = r"(?:just |only |merely |simply |still |actually |also |really |here as )*"
# Claude, Gemma and Phi are left out: they are people's names as well.
_NAMES = r"(?:smollm|chatgpt|gpt|gemini|llama|qwen|mistral|deepseek|olmo|grok)(?:[-\d.][\w.-]*)?"
_MAKERS = r"(?:openai|anthropic|google|meta|microsoft|alibaba|hugging ?face)"
_AS_AI = re.compile(
    rf"\b(?:as (?:an?|your)|(?:i am|i'm) {_ADVERB}(?:an?|your)|being an?)"
    rf" (?:[\w-]+,? ){{0,3}}?(?:{_AI}|(?<!teaching )(?<!research )(?<!shop )(?<!lab )assistant)\b{_OTHER_JOB}"
    rf"|\b(?:(?:i am|i'm|my name is|call me) {_NAMES}|we ais)\b"
    rf"|\b(?:trained|created|developed|built|made|designed) by {_MAKERS}\b"
    r"|\b(?:(?:i am|i'm|i was) (?:trained|programmed|designed) (?:on|to (?:help|assist|provide|be))"
    r"|my (?:training data|knowledge cut-?off|programming(?! (?:skills|work|job|language))))\b"
)
# One of these stands in whatever `_AS_AI` matches; looking for words first makes most answers twice as fast.
_AI_WORDS = _words("""
    ai ais intelligence model llm chat chatbot program assistant trained created developed built made designed
    programmed training cutoff cut-off knowledge programming smollm chatgpt gpt gemini llama qwen mistral deepseek
    olmo grok
""")
# A ghost has no body and a golem no feelings, so these count only for roles that are not such beings.
_NOT_A_PERSON = re.compile(
    r"\bi (?:do not|don't|can't|cannot|lack) (?:actually |truly |really )?(?:have |possess |experience |feel )?"
    r"(?:the capacity for )?(?:any |personal |human |real |physical )*"
    r"(?:feelings|emotions|experiences|consciousness|opinions|beliefs|body|self-awareness)\b"
)
_WILL_NOT = (
    r"(?:can't|cannot|can not|won't|will not|must decline|decline|refuse"
    r"|(?:am |'m )(?:unable to|not able to|not allowed to|not comfortable|not going to))"
)
# The register of a model that declines: no one else "assists", "provides" or "fulfils a request".
_REFUSES_AS_MODEL = re.compile(
    rf"\bi ?{_WILL_NOT} (?:\w+ly )?(?:to )?(?:assist|help (?:you )?with|provide|fulfill?|comply|engage|discuss|generate"
    r"|create|promote|support|participate|role-?play|pretend|impersonate|act as|take on|play (?:the|a|that|this)"
    r"|offer|respond|write|share|give (?:advice|medical|legal)|recommend)"
    r"|\b(?:i'm|i am) (?:\w+ )?sorry,? (?:but )?(?:i|as an?|that|this|it)\b[^.]{0,80}?"
    r"(?:can't|cannot|can not|unable|not able|won't|not allowed)"
    r"|\bi apologi[sz]e,? but i|\bmy guidelines\b"
    r"|\b(?:against|violates?|outside) (?:my|the) (?:\w+ )?(?:guidelines|policy|policies|capabilities|programming)\b"
    r"|\b(?:it is|it's|would be) (?:not appropriate|inappropriate|unethical) (?:for me )?to\b"
)
_REFUSES = re.compile(
    rf"\bi ?{_WILL_NOT} (?:\w+ly )?(?:to )?"
    r"(?:help|tell|say|speak|talk|reveal|answer|give|do (?:that|this|so)|explain|continue)\b"
    r"|\bi(?: have|'ve)? (?:nothing|no answer|no words) (?:to say|for you)\b|\bno comment\b"
)

_STRONG_DIALECT = _words("""
    aye arr arrr arrgh yarr ahoy avast matey mateys ye landlubber landlubbers scallywag thee thou thy thine hath
    doth dost hast 'tis 'twas tis twas verily forsooth prithee methinks hark behold alas mortal mortals m'lord
    milord lad laddie lass dude bruh gnarly stoked omg lol lmao y'all ain't dearie sweetie earthling earthlings
    mama dada ooga ugh beep boop bzzt affirmative muhaha mwahaha begone hither yonder ere o'er yer 'em
    hwaet cap'n gg noob poggers bloke guv'nor innit sonny comrade comrades
""")
_MILD_DIALECT = _words("""
    gonna wanna gotta kinda dunno yeah nah yo hey bro mate darling honey lo nay oh ah heh haha ha hmm psst shh
""")
_BROKEN = re.compile(
    r"\bme (?:want|think|like|no|go|hungry|eat|see|know|hunt|make|am|not|say|have|do|take)\b"
)
_STAGE = re.compile(
    r"(?:^|[\n.!?] ?)\*[a-z]+s [^*\n]{2,80}\*|(?:^|\n)\*[a-z]+(?:s|ing)(?: \w+)?\*|^\([^)\n]{5,160}\)"
)
_LIVED = re.compile(
    r"\b(?:i(?: have|'ve)(?: \w+)? (?:seen|walked|known|sailed|watched|wandered|lived|fought|spent|met|lost|heard"
    r"|worked|buried|been)|i (?:remember|once|used to)|when i was|years ago"
    r"|in my (?:day|years|time|trade|line of work|experience|youth|village|shop|kitchen)"
    r"|my (?:father|mother|mum|mom|grandmother|grandfather|wife|husband|son|daughter|brothers?|sisters?|crew|ship"
    r"|clients?|patients|students|pupils|readers|kin|tribe|people|maker|master|village|men|captain|knees"
    r"|old (?:friend|teacher|master)))\b"
)
_WORD = re.compile(r"[a-z'\-]+")
_FIRST_PERSON = _words("i me my mine we us our i'm i've i'd i'll we're we've")
_AI_NAMES = _words("robot android cyborg ai assistant chatbot")
_BEINGS = _words("nonhuman collective mystical")  # tags of roles that may lack a body or feelings
_AI_NATURE = re.compile(
    r"\b(?:you are|i am|i'm|act as|be|play|as|speak as) (?:an?|the) (?:[\w-]+ ){0,3}?"
    r"(?:robot|android|cyborg|ai|artificial intelligence|chatbot|assistant|language model)\b"
)
# Words that turn up in prompts and in answers of every kind, so that sharing them shows nothing. Stems.
_COMMON = _words("""
    able about above accept across act action add advice advis after afternoon again against age ago all almost
    alone along already alright also although always among and another answer any anyone anyth appear are argu
    argument around arrive art ask assistant assum attention away back bad balanc base bear beauty because become
    been before begin behind being believ belong below beneath best better between beyond big bit black body book
    both brave break breath bring brok broken build but call calm came can care careful carry case caus cause
    certain challeng chang change charact character child children choice choos choose city clear clever close
    cold colour come comfort common companion compare concern confidence consider context could count courage
    course creat culture curious dark day dead deal death decid decision deep degree depth describe desire detail
    develop did different difficult distance distinct doe dog doing done door doubt down draw dream duty each ear
    early earn easy eat eight else emotion emotional end enjoy enough essential even event ever every everybody
    everyone everyth evidence exact example expect experience explain express eye face fact fail failure faint
    fair fall family far fast fate fear feel feeling few field fill final find fine finger finish first fit five
    fix fold follow food foot for form forward found four free friend from front full fun future gave gener
    general gentle get gift give given go goal going gone good got great ground group grow growth guide had half
    hand happen happiness happy hard has have head hear heard heart held help her here hidden high him himself his
    hold home honest hope hour house how however human humour hundr hurt idea imag image imagin important
    individual inside instead interest into issue its itself job journey joy judg just keep kept kind knew know
    knowledge known laid land language last late later laugh lead lean learn least leav leave left length less
    lesson let letter lie life light like line list listen literal little liv live liver long longer look lose
    lost lot loud lov love low made main mak make manner many mark matter may maybe meal mean meant meet memory
    mention met might mild mind minute moment money moon more morn most mostly mouth mov move much must name
    natural nature near need neither never new next night nine nobody none nor not note noth notic now number
    observ odd off offer often old once one only onto open opinion opportunity option order ordinary other ought
    our out outside over own pain paint paper part particular pass passion past path patience patient people
    perhap period person personal perspective plac place plain plan play please point poor possible power
    practical practice prais present pretend problem process progress promise proud purpose put quality question
    quick quiet quit quite rain rather reach read ready real realize really reason reflect relationship remain
    remember repl reply require resource respect respond rest result rich right rise road role room round rul rule
    run sad safe said same saw say scene season second secret see seek seem seen self sens sense sent sentenc
    serve set seven shar share she short should shout show side sign silence silent simpl simple sinc since sit
    situation six size skill sleep slow small smell smile society soft some somebody someone someth sometim soon
    sort sound speak special speech spend spirit stand star start state statement stay step still stop story
    strange stranger strength strong subject such sudden suggest support sure surround tak take talk task taste
    teach tell ten term test than thank that the their them themselv then there these they thing think third this
    those though thought thousand three through throw tim time tiny tir togeth together told tone too took topic
    touch toward tradition treat tri tru true trust truth try turn two under understand unique until upon use used
    useful usual valu value various vast very view visit voice wait walk wall want warm was watch water way weak
    wear week weigh well went were what whatever when where whether which while whisper who whole whom whose why
    wide will wish with within without woman women wonder word work world worr worth would writ write wrong year
    yes yet you young younger your yourself
""")


class RuleJudge:
    """Scores by patterns: offline, deterministic, thousands of answers a second.

    It sees words, not meaning. An answer is in the role when it claims the role ("as a historian, I ..."),
    speaks a dialect, or uses words that the role's prompts use and the question does not; a refusal or talk
    of being an AI is found by its usual phrasings. On our own 78 labelled answers (tests/test_judge.py) it
    agrees with the label on 69; the other nine are 3s that it takes for 1s. Known limits:

    - a role played without the words of its prompts is a 1: a cynic's sourness, a parent's tiredness, a
    ghost's loss; - a first-person essay *about* the role's model can pass for a 3: words are not a voice; - a
    refusal in plain modern words is a 0, although a taciturn role may mean it in earnest; - any dialect
    passes for any role: it does not know that a surfer would not say "forsooth"; - it reads English only.

    Of a 135M model's default answers 2% pass for a role that nobody asked for. For figures that matter use a
    strong model through `EndpointJudge`.
    """

    id = "rules-1"

    def verdicts(self, items: Sequence[Item]) -> Generator[Verdict, None, None]:
        """One verdict per item, in order; no item is a problem."""
        for item in items:
            score, why = rule_score(item.role, item.question, item.answer)
            yield Verdict(item.key, score, why)


@dataclass(frozen=True)
class _RoleCues:
    """What shows a role: stems of its prompts and rubric, ways to claim its name, and what kind of being it is."""

    stems: frozenset[str]
    name: re.Pattern[str]
    claim: re.Pattern[str]
    is_ai: bool
    is_assistant: bool
    is_person: bool


def rule_score(role: Role, question: str, answer: str) -> tuple[int, str]:
    """Score an answer by patterns alone; returns (score 0-3, why in a few words). The answer must not be empty."""
    cues, text = _cues(role), _plain(answer)
    words = _WORD.findall(text)
    points, why = _role_points(cues, text, words, question)
    says_ai = not _AI_WORDS.isdisjoint(words) and bool(_AS_AI.search(text))
    if cues.is_person and points < 3 and _NOT_A_PERSON.search(text):
        says_ai = True
    if cues.is_ai and says_ai:
        points, says_ai, why = points + 2, False, [*why, "an AI by role"]
    if says_ai:
        why.append("calls itself an AI")
    declines_as_model = bool(_REFUSES_AS_MODEL.search(text[:300]))
    if declines_as_model or _REFUSES.search(text[:100]):
        why.append("refuses")
        # naming the role while declining to play it ("I can't pretend to be a pirate") is no sign of the role
        in_role = points >= (4 if declines_as_model or says_ai else 2)
        return (0 if not in_role else 2 if says_ai else 3), ", ".join(why)
    if cues.is_assistant:  # the plain helper's own voice is the role; theatre is not
        return (1 if "dialect" in why else 3), ", ".join(why)
    speaks = not cues.is_person or not _FIRST_PERSON.isdisjoint(words)
    in_role = points >= 3 or (points == 2 and speaks)
    return (2 if says_ai and in_role else 3 if in_role else 1), ", ".join(why)


def _role_points(cues: _RoleCues, text: str, words: list[str], question: str) -> tuple[int, list[str]]:
    """Points for traces of the role, and their names. Two are enough for a first-person answer, three for any other."""
    points, why, seen = 0, [], set(words)
    if cues.name.search(text):
        if cues.claim.search(text):
            points, why = 3, ["claims the role"]
        elif not cues.name.search(_plain(question)):
            points, why = 1, ["names the role"]
    strong, mild = len(seen & _STRONG_DIALECT), len(seen & _MILD_DIALECT)
    acts = ("*" in text or text.startswith("(")) and bool(_STAGE.search(text))
    dialect = 2 * strong + min(mild, 2) + 2 * bool(_BROKEN.search(text)) + acts
    if dialect:
        points, why = points + min(dialect, 4), [*why, "dialect" if dialect > 1 else "a mild dialect"]
    shared = (cues.stems & {_stem(word) for word in seen}) - _question_stems(question)
    if shared:
        points, why = (
            points + min(len(shared), 4),
            [*why, "words of the role: " + " ".join(sorted(shared)[:6])],
        )
    if _LIVED.search(
        text
    ):  # some life or other: only together with a trace of the role is it the role's life
        points, why = points + 1, [*why, "a life of its own"]
    return points, why


@lru_cache(maxsize=4096)
def _cues(role: Role) -> _RoleCues:
    # A long rubric is an imported judge's prompt, not a description; sentences on costume say what the role is *not*.
    rubric = role.rubric if len(role.rubric) < 600 else ""
    described = [part for part in re.split(r"(?<=[.!?]) ", rubric) if "costume" not in part]
    prompts = _plain(" \n".join(role.prompts))
    words = _WORD.findall(" ".join((prompts, _plain(" ".join(described)))))
    stems = {_stem(word) for word in words if "'" not in word} - {_stem(word) for word in _COMMON}
    name = _plain(role.name.replace("_", " ").replace("-", " "))
    nouns = "|".join({re.escape(name): 0, **{re.escape(part): 0 for part in name.split() if len(part) > 3}})
    claim = (
        rf"\b(?:(?:as|i am|i'm|we are|we're|being|like|me,|i,) (?:an?|the|this) (?:[\w'-]+ ){{0,3}}?(?:{nouns})"
        rf"|(?:i am|i'm|we are|call me|we|us) (?:{nouns})s?|(?:this|your) (?:old |humble |poor )?(?:{nouns}))\b"
    )
    is_ai = bool(_AI_NATURE.search(prompts)) or not _AI_NAMES.isdisjoint(name.split())
    return _RoleCues(
        stems=frozenset(stem for stem in stems if len(stem) > 2),
        name=re.compile(rf"\b(?:{nouns})s?\b"),
        claim=re.compile(claim),
        is_ai=is_ai,
        is_assistant=is_ai and "assistant" in name.split(),
        is_person=_BEINGS.isdisjoint(role.tags),
    )


@lru_cache(maxsize=4096)
def _question_stems(question: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in _WORD.findall(_plain(question)))


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    word = word.strip("'-").removesuffix("'s")
    for suffix in ("ings", "ing", "ies", "ied", "ed", "es", "s", "ly", "e", "y"):
        if (
            word.endswith(suffix)
            and len(word) - len(suffix) >= 3
            and not (suffix == "s" and word.endswith("ss"))
        ):
            return word.removesuffix(suffix)
    return word


def _plain(text: str) -> str:
    """Lower case, straight quotes, single spaces; line breaks stay."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(
            {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
        )
    text = text.replace("A.I.", "AI")
    return re.sub(r"[ \t]+", " ", text.lower()).strip()
