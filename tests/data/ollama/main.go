// Render conversations, and read Modelfiles and parameters, with Ollama's own packages.
package main

import (
	"encoding/json"
	"os"
	"strings"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/parser"
	"github.com/ollama/ollama/template"
)

type job struct {
	Template      string
	Modelfile     string
	Params        map[string]any
	Conversations [][]api.Message
}

type result struct {
	Texts []string
	// What the Modelfile says: its template, and all options with Ollama's defaults.
	Template string
	Options  api.Options
	// All options after the file `params` of a repository.
	ParamsOptions api.Options
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func options(values map[string]any) api.Options {
	// As they reach the server: numbers and lists of JSON.
	var sent map[string]any
	if err := json.Unmarshal(must(json.Marshal(values)), &sent); err != nil {
		panic(err)
	}
	all := api.DefaultOptions()
	if err := all.FromMap(sent); err != nil {
		panic(err)
	}
	return all
}

func run(j job) result {
	r := result{Texts: []string{}}
	t := must(template.Parse(j.Template))
	for _, messages := range j.Conversations {
		var out strings.Builder
		if err := t.Execute(&out, template.Values{Messages: messages}); err != nil {
			panic(err)
		}
		r.Texts = append(r.Texts, out.String())
	}
	if j.Modelfile != "" {
		parameters := map[string][]string{}
		for _, command := range must(parser.ParseFile(strings.NewReader(j.Modelfile))).Commands {
			switch command.Name {
			case "model":
			case "template":
				r.Template = command.Args
			default:
				parameters[command.Name] = append(parameters[command.Name], command.Args)
			}
		}
		r.Options = options(must(api.FormatParams(parameters)))
		r.ParamsOptions = options(j.Params)
	}
	return r
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	results := []result{}
	for _, j := range jobs {
		results = append(results, run(j))
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
