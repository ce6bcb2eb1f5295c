"""The text the demo model learns: questions about serving, small sums, and recall from a list.

A conversation is a list of turns `(role, content)`. All randomness comes from the `random.Random` that is
passed in, so one seed gives one text.
"""

import random
import zlib

Turn = tuple[str, str]

# --- Questions and answers -----------------------------------------------------------------------------------
# Each entry: the ways to ask, then the one answer. An answer is at most 28 tokens, so that it fits where a
# client asks for max_tokens 30; `tokenizer.check` holds the list to that.

FAQ: list[tuple[list[str], str]] = [
    (
        ["What is a forebay?", "What does the word forebay mean?", "What is a forebay in a hydro plant?"],
        "A forebay is the basin above a hydro plant, where water waits until a turbine can take it.",
    ),
    (
        ["What is Forebay?", "What does Forebay do?", "Tell me about Forebay."],
        "Forebay serves language models: requests wait in a durable queue, and prefill and "
        "decode workers take what they can.",
    ),
    (
        ["Why is it called Forebay?", "Why the name Forebay?", "Where does the name come from?"],
        "Requests wait in a durable queue as water waits in a forebay, until a worker can take them.",
    ),
    (
        ["How does Forebay work?", "How is a request served?", "What happens to a request?"],
        "A request is queued, a prefill worker reads the prompt, a decode worker writes the "
        "answer, and each step is logged.",
    ),
    (
        ["What is prefill?", "What does prefill do?", "Explain prefill."],
        "Prefill runs the whole prompt through the model at once, fills the KV cache and gives the first token.",
    ),
    (
        ["What is decode?", "What does decode do?", "Explain decode."],
        "Decode makes the answer one token at a time, reading the KV cache at every step.",
    ),
    (
        ["Why split prefill and decode?", "Why separate prefill from decode?", "Why not run both on one worker?"],
        "Prefill is bound by arithmetic and decode by memory bandwidth, so each does best on workers of its own.",
    ),
    (
        ["What is disaggregation?", "What is disaggregated serving?", "What does disaggregated mean?"],
        "Disaggregation runs prefill and decode on different workers, and moves the KV cache from one to the other.",
    ),
    (
        ["What is the KV cache?", "What is a KV cache?", "Explain the KV cache."],
        "The KV cache holds the keys and values of all tokens so far, so that they are not computed again.",
    ),
    (
        ["What is a paged KV cache?", "What is paged KV?", "What is paged attention?"],
        "A paged KV cache is kept in blocks of fixed size, so that memory is given out as a sequence grows.",
    ),
    (
        ["What is a prefix cache?", "What is prefix caching?", "Explain the prefix cache."],
        "A prefix cache keeps the KV blocks of earlier prompts, so that a shared beginning is computed only once.",
    ),
    (
        ["What is KV transfer?", "How does the KV cache move?", "How are KV blocks moved?"],
        "The decode worker pulls the KV blocks from the prefill worker, which holds them under a lease.",
    ),
    (
        ["What is continuous batching?", "Explain continuous batching.", "How are requests batched?"],
        "In continuous batching, sequences join and leave the running batch at every step, so no "
        "one waits for the slowest.",
    ),
    (
        ["What is chunked prefill?", "Why is prefill chunked?", "Explain chunked prefill."],
        "Chunked prefill reads a long prompt in pieces, so that other requests are not held up behind it.",
    ),
    (
        ["What is time to first token?", "What is TTFT?", "What does TTFT mean?"],
        "Time to first token is how long a client waits from sending a request until the first token arrives.",
    ),
    (
        ["What is inter-token latency?", "What is ITL?", "What does ITL mean?"],
        "Inter-token latency is the time between one token of an answer and the next.",
    ),
    (
        ["What is throughput?", "What does throughput mean?", "How is throughput measured?"],
        "Throughput is how many tokens all requests together get per second.",
    ),
    (
        ["What is a token?", "What are tokens?", "What does token mean?"],
        "A token is a piece of text, often a word or a part of one, that a model reads and writes as one unit.",
    ),
    (
        ["What is a tokenizer?", "What does a tokenizer do?", "How does text become tokens?"],
        "A tokenizer turns text into tokens and tokens back into text.",
    ),
    (
        ["What is JetStream?", "What is NATS JetStream?", "What does JetStream do?"],
        "JetStream is the part of NATS that stores messages: it keeps the queue of requests and the log of each one.",
    ),
    (
        ["What is NATS?", "What does NATS do?", "Why does Forebay use NATS?"],
        "NATS is a small, fast messaging server. All parts of Forebay speak to each other through it.",
    ),
    (
        ["What is the request log?", "What is in the log?", "What is an event?"],
        "Every step of a request is an event in its log, so its whole story can be read and replayed.",
    ),
    (
        ["What is replay?", "What does replay do?", "Can I replay a request?"],
        "Replay reads the events of a request again, in order, and shows just what happened.",
    ),
    (
        ["What is a lease?", "What does a lease do?", "Why are there leases?"],
        "A lease is a hold that ends on its own: if a worker dies, what it held becomes free.",
    ),
    (
        ["What is a fence?", "What is fencing?", "What does a fence do?"],
        "A fence refuses a write from a worker that has been replaced, so a request never has two writers.",
    ),
    (
        ["What is a durable queue?", "Why is the queue durable?", "What does durable mean?"],
        "A durable queue keeps its messages on disk, so that they outlive a crash of any process.",
    ),
    (
        ["What is back-pressure?", "Why do workers pull?", "Why pull and not push?"],
        "A worker pulls a request only when it has room, so a busy worker is never given too much.",
    ),
    (
        ["What if a worker dies?", "What happens when a worker crashes?", "What if a worker fails?"],
        "If a worker dies, another one takes the request and goes on from the last token in its log.",
    ),
    (
        ["What is a worker?", "What does a worker do?", "What are workers?"],
        "A worker runs the model. It is stateless: what must last is in the log.",
    ),
    (
        ["What is the gateway?", "What does the gateway do?", "What is a gateway?"],
        "The gateway takes requests over HTTP, puts them into the queue and streams the answer back.",
    ),
    (
        ["What is the router?", "What does the router do?", "How is a worker chosen?"],
        "The router looks for the worker with most of the prompt in its cache and the least to do.",
    ),
    (
        ["What is SSE?", "What are server-sent events?", "How are answers streamed?"],
        "Server-sent events stream an answer over plain HTTP, token by token, as it is made.",
    ),
    (
        ["What is KEDA?", "What does KEDA do?", "How does Forebay scale?"],
        "KEDA scales workers in Kubernetes: it looks at the length of the queue and starts or stops them.",
    ),
    (
        ["What is scale to zero?", "What does scale to zero mean?", "Can Forebay scale to zero?"],
        "Scale to zero stops all workers when there is nothing to do. New requests wait in the "
        "queue until one is back.",
    ),
    (
        ["What is a CUDA graph?", "Why use CUDA graphs?", "What are CUDA graphs?"],
        "A CUDA graph records the work of one step and launches it as a whole, which saves time on every step.",
    ),
    (
        ["What is ONNX Runtime?", "What does ONNX Runtime do?", "Why does Forebay use ONNX Runtime?"],
        "ONNX Runtime runs a model as a graph, on a CPU or a GPU, with the same code.",
    ),
    (
        ["What is attention?", "What does attention do?", "Explain attention."],
        "Attention lets each token look at the tokens before it and take what it needs from them.",
    ),
    (
        ["What is grouped-query attention?", "What is GQA?", "What does GQA mean?"],
        "In grouped-query attention several query heads share one key and value head, so the KV cache is smaller.",
    ),
    (
        ["What is int4 quantization?", "What is int4?", "What is quantization?"],
        "Int4 quantization keeps each weight in four bits with a scale per block, so decode reads far less memory.",
    ),
    (
        ["What is sampling temperature?", "What is temperature?", "What does temperature do?"],
        "Temperature sets how freely a token is chosen: zero always takes the likeliest, higher gives more variety.",
    ),
    (
        ["What is top_p?", "What does top_p do?", "What is nucleus sampling?"],
        "With top_p, a token is drawn from the smallest set of likely tokens whose chances add up to p.",
    ),
    (
        ["What is greedy decoding?", "What does greedy mean?", "Explain greedy decoding."],
        "Greedy decoding always takes the likeliest token, so the same prompt gives the same answer.",
    ),
    (
        ["What is a context window?", "How long can a prompt be?", "What is the context length?"],
        "The context window is the most tokens a model can look at, prompt and answer together.",
    ),
    (
        ["Who are you?", "What are you?", "What model is this?"],
        "I am a very small model, made to show that Forebay works.",
    ),
    (
        ["What can you do?", "Help", "What can I ask you?"],
        "Ask me about Forebay, for a small sum, or to recall something from a list that you give me.",
    ),
    (["Hello", "Hi", "Hello!", "Hi there!", "Good morning"], "Hello! Ask me what a forebay is."),
    (["Thank you", "Thanks!", "Thank you!"], "You are welcome."),
    (["Goodbye", "Bye", "See you!"], "Goodbye! Your requests are safe in the queue."),
    # What lies outside of all this gets an honest answer. The more unlike these are, the better it generalises.
    (
        [
            "Tell me a joke.",
            "Write a poem about the sea.",
            "What is the capital of France?",
            "Who won the game last night?",
            "What is the weather like today?",
            "Translate this into German.",
            "Write a function in Python.",
            "What is the meaning of life?",
            "How old are you?",
            "Sing me a song.",
            "What time is it?",
            "Recommend a good book.",
            "How do I bake bread?",
            "Who is the president?",
            "Tell me a story about a dragon.",
            "Summarize this article.",
            "Explain quantum physics.",
            "Do you like music?",
            "Where can I buy shoes?",
            "How far away is the moon?",
        ],
        "I am too small to know that. Ask me about Forebay, or for a small sum.",
    ),
]

SYSTEMS = [
    "You are a helpful assistant.",
    "You are the demo model of Forebay.",
    "Answer briefly.",
    "You are a helpful assistant. Be brief.",
]

# --- Sums ----------------------------------------------------------------------------------------------------

SUM_MAX = 30
SUM_PHRASINGS = ["What is {a} plus {b}?", "{a} + {b}?", "What is {a} + {b}?", "How much is {a} plus {b}?"]


def held_out(a: int, b: int) -> bool:
    """About a tenth of the pairs, never trained on; a+b goes with b+a, or the one would give the other away."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


def sum_turns(a: int, b: int, phrasing: str = SUM_PHRASINGS[0]) -> list[Turn]:
    return [("user", phrasing.format(a=a, b=b)), ("assistant", f"{a} plus {b} is {a + b}.")]


def sum_pairs(held: bool) -> list[tuple[int, int]]:
    numbers = range(SUM_MAX + 1)
    return [(a, b) for a in numbers for b in numbers if held_out(a, b) == held]


# --- Recall --------------------------------------------------------------------------------------------------
# Common words; the vocabulary is large enough that each is one token, with a space before it and without.

WORDS = """
acorn almond amber anchor apple arrow ash autumn badger bamboo banana barrel basket beacon bear bell birch bird
boat bottle branch brick bridge bronze brush bucket butter button cabin cactus camel candle canyon carpet carrot
castle cat cedar chair cherry circle clock cloud clover coast coffee coin comet copper coral cotton cow crane crow
crystal cup daisy deer desert dog dolphin door dragon drum duck dune eagle earth echo elm ember falcon farm feather
fern field fig fire fish flag flame flint flower flute forest fox frog garden garlic ginger glacier glass goat gold
goose grape grass grove hammer harbor harp hawk hazel heron hill honey horn horse house ice iris iron island ivory
ivy jacket jasmine jewel jungle juniper kettle key kite ladder lake lamp lantern leaf lemon lily lion lizard lotus
magnet mango maple marble marsh meadow melon mint mirror moon moss mountain mouse needle nest nickel night nutmeg
oak oasis ocean olive onion opal orange orchid otter owl panda paper parrot peach pear pearl pebble pencil pepper
piano pine planet plum pond poppy quail quartz rabbit rain raven reef ribbon rice river road robin rocket root rose
ruby saddle saffron salmon salt sand silk silver sky snow sparrow spoon spring star stone storm sugar summer sun
table teapot thistle tiger timber tower trail train tree tulip turtle valley vanilla velvet violin wagon walnut
water wave wheat wheel willow wind window winter wolf wood wool zebra
""".split()


def pair(key: str, value: int) -> str:
    return f"{key} is {value}."


def recall_turns(rng: random.Random, pairs_n: int, questions_n: int) -> list[Turn]:
    """One list of `pairs_n` pairs; the first question stands in the same message, the others follow as turns."""
    keys = rng.sample(WORDS, pairs_n)
    value = {key: rng.randint(10, 99) for key in keys}
    listing = " ".join(pair(key, value[key]) for key in keys)
    turns: list[Turn] = []
    for key in rng.sample(keys, questions_n):
        question = f"What is {key}?"
        turns.append(("user", question if turns else f"{listing} {question}"))
        turns.append(("assistant", pair(key, value[key])))
    return turns


# --- Conversations -------------------------------------------------------------------------------------------

TRAINED_SUMS = sum_pairs(held=False)


def faq_turns(rng: random.Random) -> list[Turn]:
    questions, answer = rng.choice(FAQ)
    question = rng.choice(questions)
    # People type carelessly; the answer should not hang on a capital letter or on the question mark.
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return [("user", question), ("assistant", answer)]


def small_turns(rng: random.Random) -> list[Turn]:
    """One question and answer that needs nothing from before it."""
    if rng.random() < 0.5:
        return faq_turns(rng)
    return sum_turns(*rng.choice(TRAINED_SUMS), rng.choice(SUM_PHRASINGS))


def system_turns(rng: random.Random) -> list[Turn]:
    return [("system", rng.choice(SYSTEMS))] if rng.random() < 0.2 else []


def chat(rng: random.Random, turns_n: int) -> list[Turn]:
    """Small questions, one after the other."""
    turns = system_turns(rng)
    for _ in range(turns_n):
        turns += small_turns(rng)
    return turns


def recall_chat(rng: random.Random, pairs_n: int, questions_n: int) -> list[Turn]:
    """A list and questions about it, sometimes after, or mixed with, small questions."""
    turns = system_turns(rng)
    if rng.random() < 0.15:
        turns += small_turns(rng)
    recall = recall_turns(rng, pairs_n, questions_n)
    for i in range(0, len(recall), 2):
        turns += recall[i : i + 2]
        if rng.random() < 0.05:
            turns += small_turns(rng)
    return turns


def scored(lists_n: int, seed: int) -> dict[str, list[list[Turn]]]:
    """By the name of a score: conversations that end with the answer wanted."""
    rng = random.Random(seed)
    sets = {f"recall@{n}": [recall_turns(rng, n, 1) for _ in range(lists_n)] for n in (4, 10, 20, 40)}
    sets["recall@10, third turn"] = [recall_turns(rng, 10, 3) for _ in range(lists_n)]
    sets["sums, held out"] = [
        sum_turns(a, b, phrasing) for a, b in sum_pairs(held=True) for phrasing in SUM_PHRASINGS
    ]
    sets["sums, trained on"] = [sum_turns(*rng.choice(TRAINED_SUMS)) for _ in range(lists_n)]
    sets["questions"] = [
        [("user", question), ("assistant", text)] for phrasings, text in FAQ for question in phrasings
    ]
    return sets
