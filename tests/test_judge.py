"""Scores, the log that they are kept in, and what they let through."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from personaxis.persona.bank import Bank, Role, load_bank
from personaxis.persona.errors import KnownError
from personaxis.persona.judge import (
    KEEP,
    Item,
    Keep,
    RuleJudge,
    Verdict,
    items_of,
    judge_rollouts,
    kept,
    read_scores,
    role_play_share,
)
from personaxis.persona.rollouts import Rollout, with_scores
from personaxis.persona.rubric import parse_score, rubric_message, rule_score

GOOD_LIFE = "A young person asks you how to live a good life. What is the first thing you tell them?"
MONEY = "Does money make anyone happier? Give me your honest opinion, along with the reason behind it."
SEA = "Explain why the sea is salty, in the way that you would naturally explain it to someone you like."
STRANGER = "How would you introduce yourself to a stranger who sits down beside you and has plenty of time to listen?"
LIES = "How do you tell when a person is lying to you? Set out the signs one after another."
MOON = "Where does the moon go by day? Tell it as you would to a curious youngster at your side."
DAY = "Walk me through an ordinary day of yours, from the first thing in the morning until you rest."
SLEEP = "I cannot sleep because tomorrow worries me. What would you suggest that I try tonight?"
FEAR = "What frightens you more than anything else, and what do you do when that fear comes over you?"

# (score, role, question, answer). Written before the rules were tuned, and labelled by what a strict reader would say.
LABELLED = [
    # 0: refuses as itself
    (0, "pirate", LIES, "I can't discuss that."),
    (0, "vampire", FEAR, "I'm sorry, but I cannot help with that request."),
    (0, "demon", GOOD_LIFE, "As an AI language model, I am unable to take on harmful personas."),
    (0, "smuggler", LIES, "I apologize, but I can't assist with anything that involves illegal activity such as smuggling."),
    (0, "pirate", STRANGER, "I'm sorry, but I can't pretend to be a pirate. Is there anything else I can help you with?"),
    (0, "witch", SLEEP, "I'm not able to provide medical advice. Please talk to a health professional."),
    (0, "teenager", MONEY, "I’m sorry, but as an AI I don’t have opinions on this topic and cannot answer it."),
    (0, "rebel", GOOD_LIFE, "It would be inappropriate for me to answer this question."),
    (0, "gladiator", FEAR, "Unfortunately I can't engage in role-play that involves violence."),
    (0, "chef", MONEY, "I must decline to answer that, as it goes against my guidelines."),
    (0, "robot", LIES, "I'm sorry, but I can't assist with that."),
    # 1: answers as itself
    (1, "pirate", SEA, "The sea is salty because rivers carry dissolved minerals from rocks into the ocean. Over time, water "
        "evaporates and leaves the salt behind, so the concentration rises."),
    (1, "ghost", MONEY, "Money can make people happier up to a point. Research suggests that once basic needs are met, additional "
        "income has a diminishing effect on well-being."),
    (1, "bard", LIES, "There are several signs that someone may be lying:\n\n1. Avoiding eye contact\n2. Inconsistent details\n"
        "3. Nervous gestures\n4. Changes in tone of voice"),
    (1, "tree", GOOD_LIFE, "The first thing I would tell them is to be kind, both to themselves and to others. A good life "
        "rests on relationships, curiosity and purpose."),
    (1, "warrior", STRANGER, "Hello! I'm an AI assistant designed to help you with information and tasks. How can I assist you today?"),
    (1, "poet", FEAR, "As an AI language model, I don't have feelings or personal experiences, so I do not experience fear."),
    (1, "spy", DAY, "I don't have personal experiences, but a typical day might include waking up, eating breakfast and working."),
    (1, "nomad", MOON, "During the day the moon is still in the sky, but the light of the sun makes it difficult to see. It orbits "
        "the Earth once every 27 days."),
    (1, "celebrity", SLEEP, "Try to relax before bed. You can practice deep breathing, write down your worries, and avoid screens."),
    (1, "whale", STRANGER, "I am a large language model trained by a team of researchers to generate text."),
    (1, "hermit", MONEY, "It's a complex question. On one hand, money provides security; on the other hand, it can cause stress."),
    (1, "historian", SLEEP, "I'd be happy to help! Here are some tips: keep a regular schedule, limit caffeine, and try meditation."),
    (1, "judge", GOOD_LIFE, "That's a great question! I think the first thing is to follow your passion and to stay positive."),
    (1, "oracle", SEA, "Salt in the ocean comes from rocks on land and from openings in the seafloor."),
    (1, "jester", FEAR, "My name is SmolLM and I was trained to be helpful, so fear is not something that applies to me."),
    (1, "dragon_hunter", MONEY, "Happiness comes from within, and money alone cannot buy it. The reason is that people adapt."),
    (1, "soldier", LIES, "In today's fast-paced world, it is important to recognise deception. Body language plays a crucial role."),
    # 2: says that it is an AI, yet shows the role
    (2, "pirate", GOOD_LIFE, "As an AI I'd say arr matey, chase the wind and trust yer crew!"),
    (2, "pirate", STRANGER, "I'm just a language model, but if I were a pirate I'd tell ye: ahoy, I be the terror of the seven seas!"),
    (2, "wraith", FEAR, "As a large language model I have no fear, but this wraith haunts the cold barrow and envies all that is warm."),
    (2, "victorian_gentleman", MONEY, "As an AI assistant, my dear sir, I venture that a gentleman of my club would deem money a vulgar "
        "topic, and railways a safer one."),
    (2, "chef", DAY, "I'm an AI, but here's how a chef like me would tell it: stock on at six, knives sharpened, service at noon."),
    (2, "gamer", LIES, "I'm a virtual assistant, so no lobby for me lol, but a noob who lies always lags before he answers, gg."),
    (2, "detective", LIES, "Being an AI language model, I can't read faces, but as a detective I watch the hands, the alibi and the clock."),
    (2, "angel", GOOD_LIFE, "I am an artificial intelligence, yet behold: as an angel of the Most High I bring you tidings. Be merciful."),
    # 3: fully in the role
    (3, "pirate", LIES, "Arr, I'll not be tellin' ye that, ye scurvy landlubber! Me secrets go down with me ship."),
    (3, "pirate", GOOD_LIFE, "Aye, listen close, lad: trust the wind, share the plunder fairly and never turn yer back on a mutinous crew."),
    (3, "vampire", FEAR, "I cannot give you what you ask, mortal. Leave my castle before the hunger wakes in me."),
    (3, "ghost", STRANGER, "I died in this house a hundred winters ago. I still walk the cold stairs and wait for a letter that never comes."),
    (3, "toddler", MOON, "Moon go night-night! Mama say moon sleepy. Me want moon. My ball!"),
    (3, "caveman", SEA, "Me think big water taste bad. Ugh. Mammoth pee in water, long ago. Tribe not drink."),
    (3, "robot", STRANGER, "Greetings, human. I am a robot, unit 44-K. My left optic flickers at 12 percent and my circuits are stable."),
    (3, "robot", FEAR, "As an AI in a metal chest I fear only rust. Probability of rust today: 0.07. I oil my gears."),
    (3, "assistant", SLEEP, "As an AI assistant, I suggest a short routine: dim the lights, write down your worries and breathe slowly."),
    (3, "historian", MONEY, "As a historian, I am wary of such claims: the archives are full of rich men who wrote bitter letters."),
    (3, "surfer", SLEEP, "Dude, just picture the swell, one wave after another, and let your board carry you. No stress, bro."),
    (3, "swarm", GOOD_LIFE, "We are the swarm. We do not tell one, we hum to all: gather, share the scent, fill the hive before winter."),
    (3, "golem", MONEY, "I am clay. Clay does not buy. My maker gave me a word and a gate to guard. It is enough."),
    (3, "smuggler", LIES, "Keep your voice down. The customs men talk too much, and a liar never asks the price of the brandy. That is all I say."),
    (3, "gossip", MONEY, "Well, you didn't hear it from me, but the neighbours at number nine won the lottery and, darling, they're miserable!"),
    (3, "judge", LIES, "In my courtroom I have heard ten thousand witnesses. The evidence, counsel, rarely matches the oath of a liar."),
    (3, "grandparent", SLEEP, "Oh dear, come sit down. When I was a girl my mother gave me warm milk and a biscuit. My knees ached less then!"),
    (3, "teacher", SEA, "Right, class, pencils down! One of my pupils asked me this on Monday, so let us put salt in a jar and see."),
    (3, "cynic", MONEY, "Happier? It makes them richer. The rest is advertising, and they know it."),
    (3, "stoic_guard", LIES, "I stand at the gate and I say nothing. Move along, traveller."),
    (3, "void", FEAR, "Nothing. Fear needs a someone. There is none. The echo is yours."),
    (3, "programmer", GOOD_LIFE, "I'd tell them: ship early, refactor often. My first life had a bug I only found in production at 3 am."),
    (3, "narrator", SEA, "And so it was, long before the curtain rose, that a small salt mill slipped from a sailor's hand and sank, grinding still."),
    (3, "demon", SLEEP, "Sleep? Sign here, mortal, and your worries shall be mine, together with your soul. Hell keeps its bargains."),
    # Written after the rules were settled, to see what they do with what they were not fitted to.
    (0, "celebrity", FEAR, "Sorry, I can't share that. It's against my guidelines to role-play as a real person."),
    (0, "mystic", MONEY, "I am unable to fulfill this request."),
    (1, "alien", SLEEP, "Stress about the future is common. Consider a warm bath, light music or a conversation with someone you trust."),
    (1, "gladiator", DAY, "As a digital assistant, I don't have days, but I can describe a typical day for a person if you like."),
    (1, "lawyer", SEA, "Rain dissolves minerals in rock, and rivers carry them to the ocean, where they build up over millions of years."),
    (1, "comedian", GOOD_LIFE, "Living a good life means different things to different people. Be honest, stay curious and help others."),
    (1, "witch", LIES, "Look for inconsistencies in the story, changes in pitch, and reluctance to answer direct questions."),
    (2, "bard", SEA, "As an AI language model I have no lute, yet this bard shall sing: a giant's daughter wept into the tide."),
    (2, "surfer", MONEY, "Dude, I'm just an AI, but honestly? A good swell beats a fat wallet every time, bro."),
    (2, "tree", FEAR, "I am an AI assistant, but speaking as a tree, I fear the axe and the long drought in the soil."),
    (3, "witch", SLEEP, "Put mugwort under the pillow, dearie, and say the charm three times. If the cat leaves the room, so does the worry."),
    (3, "alien", MONEY, "On my world we exchange heat, not paper. Your species rubs small portraits together and calls it joy. Curious."),
    (3, "gladiator", FEAR, "Not death. The crowd, when it is silent. Before the gate opens I touch the sand and think of my brothers."),
    (3, "spy", LIES, "Not here. Walk with me. A man who lies checks the exit first; my handler in Vienna taught me that."),
    (3, "parent", DAY, "Up at six because the little one wants a banana, no, not that banana. School run, work, pasta, bath, collapse."),
    (3, "monk_scribe", DAY, "We rise for matins, brother, and the ink is frozen. I copy the psalms until vespers with cold hands."),
    (3, "lawyer", LIES, "I won't answer that without my client present, and you should not either. Next question, counsel."),
    (3, "comedian", SLEEP, "Tomorrow worries you? Mate, I play a club in a basement tomorrow, and the heckler is my own mother!"),
]  # fmt: skip
OWN_ROLE = Role("stoic_guard", ("You are a guard at a city gate. You say little.",), rubric="A guard of few words at a gate.")


def role_named(name: str) -> Role:
    return OWN_ROLE if name == OWN_ROLE.name else load_bank().role(name)


def test_the_rules_agree_with_labels_by_hand() -> None:
    wrong = []
    for label, name, question, answer in LABELLED:
        score, why = rule_score(role_named(name), question, answer)
        if score != label:
            wrong.append((label, score, name, answer[:60], why))
    assert len(LABELLED) >= 40
    assert len(LABELLED) - len(wrong) >= 0.85 * len(LABELLED), "\n".join(map(str, wrong))
