"""System prompts, and the conversation templates of the first LLaVAs, LLaVA-NeXT, Prismatic and InternVL.

{name: the fields of conversation.Template, which says what they mean}. Those of LLaVA-1.5 stand there.
"""

SYSTEM_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.")
SYSTEM_LLAVA_V1 = SYSTEM_VICUNA.replace("user", "human")
SYSTEM_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.")
SYSTEM_INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。")
SYSTEM_INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。")

PRISMATIC = {"tidy": "strip", "captions": "prism_plain"}
INTERNVL = {"stop": "<|im_end|>", "picture": ("<img>", "<image>", "</img>")}
INTERNVL2_QUESTION = "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"
INTERNVL2_5_QUESTION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

OTHER_TEMPLATES = {
    # LLaVA v1, LLaVA v0, and LLaVA on Llama-2
    "llava_v1": {
        "first": SYSTEM_LLAVA_V1 + " USER: {} ASSISTANT:",
        "human": "USER: {} ASSISTANT:",
        "answer": "« {}</s>»"},
    # llava_v0 is trained as it is asked. The original trained on "\n\n### Human: q\n### Assistant: a\n### ",
    # and supervised the "###" before Human, too. "###" is no control token: who types it ends his turn.
    "llava_v0": {
        "first": SYSTEM_LLAVA_V1 + "###Human: {}«###Assistant:»",
        "human": "Human: {}«###Assistant:»",
        "answer": "« {}###»",
        "stop": "###"},
    "llava_llama_2": {
        "first": f"[INST] <<SYS>>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]",
        "human": "<s>[INST] {} [/INST]",
        "answer": "« {} </s>»"},

    # LLaVA-NeXT over Mistral
    "mistral_instruct": {
        "first": "[INST] {} [/INST]", "human": "[INST] {} [/INST]", "answer": "« {} </s>»"},

    # Prismatic encodes each turn by itself, with its own dummy prefix: that is the space before a later
    # question, a byte that its strings lack and its ids have. Its pictures come right after <s>; prism_plain
    # is its align stage. "<<SYS>" is its own misspelling, which its weights have learned.
    "prism_plain": PRISMATIC | {"first": "{}", "human": None, "answer": "«{}</s>»", "keep_question": False},
    "prism_pure": PRISMATIC | {
        "first": "<image>In: {}\nOut:", "human": " In: {}\nOut:", "answer": "« {}</s>»"},
    "prism_vicuna": PRISMATIC | {
        "first": f"<image>{SYSTEM_VICUNA} USER: {{}} ASSISTANT:",
        "human": " USER: {} ASSISTANT:",
        "answer": "« {}</s>»"},
    "prism_llama_2": PRISMATIC | {
        "first": f"<image>[INST] <<SYS>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]",
        "human": " [INST] {} [/INST]",
        "answer": "« {}</s>»"},
    "prism_mistral": PRISMATIC | {
        "first": "<image>[INST] {} [/INST]", "human": " [INST] {} [/INST]", "answer": "« {}</s>»"},

    # InternVL-2 and InternVL-2.5
    "internlm2-chat": INTERNVL | {
        "first": f"<|im_start|>system\n{SYSTEM_INTERNVL2}<|im_end|>{INTERNVL2_QUESTION}",
        "human": INTERNVL2_QUESTION,
        "answer": "«{}<|im_end|>»",
        "tidy": "strip"},
    "internvl2_5": INTERNVL | {
        "first": f"<|im_start|>system\n{SYSTEM_INTERNVL2_5}<|im_end|>\n{INTERNVL2_5_QUESTION}",
        "human": INTERNVL2_5_QUESTION,
        "answer": "«{}<|im_end|>»\n",
        "tidy": "none"},
}
