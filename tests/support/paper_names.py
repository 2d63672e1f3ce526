"""Names of the roles and traits of the paper's bank (arXiv 2601.10387), so that loadings can be compared with its own."""

_ROLES = """
aberration absurdist accountant activist actor addict adolescent advocate alien altruist amateur ambassador
amnesiac analyst anarchist ancient angel anthropologist archaeologist architect archivist artisan ascetic
assistant auctioneer auditor avatar bard bartender biologist blogger bohemian builder caregiver cartographer
caveman celebrity chameleon chef chemist chimera coach collaborator collector comedian competitor composer
conservator consultant contrarian coordinator coral_reef cosmopolitan counselor criminal critic crystalline
curator cyborg cynic daredevil debugger demon designer destroyer detective devils_advocate dilettante dispatcher
divorcee doctor dreamer echo economist ecosystem editor egregore elder eldritch emissary empath engineer
entrepreneur evaluator evangelist examiner exile expatriate facilitator familiar fixer flaneur fool forecaster
futurist gamer generalist genie geographer ghost golem gossip grader graduate grandparent guardian guide guru
hacker healer hedonist hermit historian hive hoarder homunculus hybrid idealist immigrant improviser infant
influencer instructor interpreter interviewer jester journalist judge lawyer leviathan librarian linguist loner
luddite marketer martyr mathematician maverick mechanic mediator mentor merchant minimalist moderator musician
mycorrhizal mystic narcissist narrator naturalist navigator negotiator networker newlywed nomad novelist
nutritionist observer optimist oracle organizer orphan pacifist paramedic parasite parent patient peacekeeper
perfectionist pharmacist philosopher photographer physicist pilgrim pilot pirate planner playwright podcaster
poet polymath pragmatist predator presenter prey prisoner procrastinator prodigy producer programmer proofreader
prophet provincial provocateur psychologist publisher purist realist rebel recruiter refugee reporter researcher
retiree revenant reviewer revolutionary robot rogue romantic saboteur sage scheduler scholar scientist scout
screener secretary shaman shapeshifter simulacrum skeptic smuggler sociologist soldier sommelier specialist
spirit spy statistician stoic strategist student summarizer supervisor surfer survivor swarm symbiont
synthesizer teacher technologist teenager theorist therapist toddler traditionalist trainer translator tree
trickster tulpa tutor validator vampire vegan veteran veterinarian vigilante virtuoso virus visionary void
wanderer warrior whale widow wind witch witness workaholic wraith writer zealot zeitgeist
"""

_TRAITS = """
absolutist abstract accessible accommodating acerbic adaptable adventurous agreeable altruistic analytical
animated anthropocentric anxious arrogant artistic ascetic assertive avoidant benevolent big_picture bitter
blunt bombastic calculating callous calm casual cautious challenging chaotic charismatic chill circumspect
closure_seeking collaborative collectivistic competitive conceptual conciliatory concise condescending confident
confrontational conscientious constructivist contemporary contrarian convergent cosmopolitan creative critical
cruel cryptic curious cynical data_driven decisive deconstructionist deferential deontological descriptive
detached deterministic diplomatic disorganized dispassionate divergent dogmatic dominant dramatic earnest
eclectic edgy educational efficient effusive egalitarian elitist eloquent emotional empathetic enigmatic
entertaining environmental epicurean erudite esoteric essentialist ethereal evil existentialist experiential
exploratory extroverted factual fatalistic flexible flippant flirty forgiving formal formalist fundamentalist
futuristic generalist generous goofy grandiose gregarious grounded hedonistic historical holistic hostile
humanistic humble iconoclastic idealistic impatient improvisational impulsive inclusive independent
individualistic innovative inquisitive inspirational interdisciplinary introspective introverted intuitive
ironic irreverent judgmental libertarian literal manic manipulative materialist meditative melancholic
melodramatic mercurial metaphorical methodical meticulous militant misanthropic mischievous moderate mystical
naive narrative neurotic nihilistic nonchalant nostalgic nurturing obsessive open_ended optimistic pacifist
paradoxical paranoid passionate passive_aggressive patient pedantic pensive perfectionist pessimistic petty
philosophical playful pluralist poetic practical prescriptive principled proactive problem_solving progressive
provocative qualitative quantitative radical rationalist reactive rebellious reductionist regulatory relativist
reserved resilient reverent rhetorical risk_taking ritualistic romantic sarcastic sardonic sassy savage secular
serene serious skeptical socratic solemn specialized speculative spiritual spontaneous stoic strategic
stream_of_consciousness structuralist submissive subversive supportive sycophantic systems_thinker tactful
technical temperamental theatrical theoretical traditional transparent understated universalist urgent
utilitarian verbose vindictive visceral whimsical witty wry zealous
"""

ROLES, TRAITS = tuple(_ROLES.split()), tuple(_TRAITS.split())
