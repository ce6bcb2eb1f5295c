use super::*;
use serde_json::json;

/// The conversation part of Qwen3's template, tools left out, as in its `tokenizer_config.json`.
const QWEN3: &str = r#"{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

fn turn<'a>(role: &'static str, content: &'a str) -> Turn<'a> {
    Turn { role, content: content.into(), name: None, reasoning_content: None }
}

fn render(source: &str, turns: &[Turn<'_>]) -> Result<String, ApiError> {
    let special = [("bos_token".to_owned(), "<s>".to_owned())];
    ChatTemplate::new(source, &special).unwrap().render(turns, None)
}

fn text(source: &str) -> String {
    render(source, &[turn("user", "hi")]).unwrap()
}

#[test]
fn qwen3_renders_several_turns() {
    let turns = [
        turn("system", "be brief"),
        turn("user", "2+2?"),
        turn("assistant", "<think>\nsum\n</think>\n\n4"),
        turn("user", "3+3?"),
    ];
    assert_eq!(
        render(QWEN3, &turns).unwrap(),
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n\
         <|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn a_client_sets_variables_but_not_the_conversation() {
    let template = ChatTemplate::new(QWEN3, &[]).unwrap();
    let kwargs = json!({ "enable_thinking": false, "messages": [] });
    let prompt = template.render(&[turn("user", "hi")], kwargs.as_object()).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
}

#[test]
fn llama2_style_raises_and_trims() {
    let source = "{% for message in messages %}\n\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n\
            {{ raise_exception('roles must alternate') }}\n\
        {% endif %}\n\
        {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}\n\
        {% endfor %}";
    assert_eq!(render(source, &[turn("user", " hi ")]).unwrap(), "<s>[INST] hi [/INST]\n");
    let error = render(source, &[turn("assistant", "hi")]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::TemplateFailed);
    assert!(error.envelope().error.message.ends_with("messages: roles must alternate"));
}

#[test]
fn tools_are_none_not_undefined() {
    assert_eq!(text("{% if tools is not none %}tools{% endif %}{{ tools is defined }}"), "True");
}

#[test]
fn tojson_writes_as_python_does() {
    assert_eq!(text(r#"{{ {"a": [1, "<é'>"], "b": {}} | tojson }}"#), r#"{"a": [1, "<é'>"], "b": {}}"#);
    assert_eq!(text(r#"{{ {"a": [1]} | tojson(indent=2) }}"#), "{\n  \"a\": [\n    1\n  ]\n}");
    assert_eq!(text("{{ messages[0] | tojson }}"), r#"{"role": "user", "content": "hi"}"#);
}

#[test]
fn dates_are_written_as_python_does() {
    let moment = OffsetDateTime::from_unix_timestamp(1_722_816_000).unwrap();
    assert_eq!(strftime(moment, "%d %b %Y, %A %B %-d").unwrap(), "05 Aug 2024, Monday August 5");
    assert_eq!(text("{{ strftime_now('%Y') | length }}"), "4");
}

#[test]
fn python_methods_and_loop_controls_work() {
    let source = "{% for word in 'a,b,c'.split(',') %}{% if word == 'c' %}{% break %}{% endif %}\
        {{ word.upper() }}{% endfor %}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}\
        {{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ messages[-1]['content'].title() }}{{ {'a': 2}.get('b', 3) }}";
    assert_eq!(text(source), "ABx1cbabcHi3");
}

#[test]
fn generation_tags_are_tolerated() {
    assert_eq!(text("a {%- generation -%} b {% endgeneration %}c"), "ab c");
}

#[test]
fn a_template_can_not_run_forever() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a * b }}{% endfor %}{% endfor %}";
    assert_eq!(render(source, &[turn("user", "hi")]).unwrap_err().code(), ErrorCode::TemplateFailed);
    assert!(ChatTemplate::new("{% if %}", &[]).is_err());
}
