// Render conversations as Ollama does: the System value joins all system messages, neighbouring
// messages of one role are one message, and a key that is missing is empty.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template      string
	Conversations [][]message
}

func render(t *template.Template, messages []message) (string, error) {
	var system []string
	var merged []*message
	for i := range messages {
		m := &messages[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(merged); n > 0 && merged[n-1].Role == m.Role {
			merged[n-1].Content += "\n\n" + m.Content
			continue
		}
		merged = append(merged, m)
	}
	var out strings.Builder
	err := t.Execute(&out, map[string]any{
		"System": strings.Join(system, "\n\n"), "Messages": merged, "Response": "",
	})
	return out.String(), err
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	results := [][]string{}
	for _, j := range jobs {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(j.Template))
		texts := []string{}
		for _, messages := range j.Conversations {
			text, err := render(t, messages)
			if err != nil {
				panic(err)
			}
			texts = append(texts, text)
		}
		results = append(results, texts)
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
