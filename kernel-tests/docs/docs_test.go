package docs

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// pages are README and docs, by their paths in the module.
func pages(t *testing.T) map[string]string {
	t.Helper()
	root := testenv.ModuleRoot(t)
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(names) < 8 {
		t.Fatalf("pages: %q, %v", names, err)
	}
	found := map[string]string{}
	for _, name := range append(names, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			t.Fatal(err)
		}
		found[rel] = string(text)
	}
	return found
}

// code are the pieces of code of a page: spans, and lines of blocks without their comments.
func code(text string) (pieces []string) {
	inside := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "```"):
			inside = !inside
		case inside:
			piece, _, _ := strings.Cut(line, "  #")
			pieces = append(pieces, strings.TrimSpace(piece))
		default:
			for i, piece := range strings.Split(line, "`") {
				if i%2 == 1 {
					pieces = append(pieces, piece)
				}
			}
		}
	}
	return pieces
}

// programs are ours, each command with the options that its --help has.
func programs(t *testing.T) map[string]map[string]bool {
	t.Helper()
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), testenv.Tool(t, "go"), "build", "-o", dir+"/", "./cmd/...")
	build.Dir, build.Env = testenv.ModuleRoot(t), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	help := func(args ...string) string {
		out, _ := exec.CommandContext(t.Context(), filepath.Join(dir, args[0]), append(args[1:], "--help")...).CombinedOutput() // pflag's help is an error
		return string(out)
	}
	found := map[string]map[string]bool{"erofsd": options(help("erofsd")), "containerd-erofsd-grpc": options(help("containerd-erofsd-grpc"))}
	found["nydusd"], found["containerd-nydus-grpc"] = found["erofsd"], found["containerd-erofsd-grpc"]
	top := help("erofsctl")
	found["erofsctl"] = options(top)
	for _, name := range commands(top) {
		text := help("erofsctl", name)
		found["erofsctl "+name] = options(text)
		for _, below := range commands(text) {
			found["erofsctl "+name+" "+below] = options(help("erofsctl", name, below))
		}
	}
	return found
}

// commands are those that a help lists.
func commands(help string) (names []string) {
	_, list, _ := strings.Cut(help, "\nCOMMANDS:\n")
	for line := range strings.Lines(list) {
		if !strings.HasPrefix(line, "   ") {
			break
		}
		name, _, _ := strings.Cut(strings.TrimSpace(line), "  ")
		for n := range strings.SplitSeq(name, ",") {
			if n = strings.TrimSpace(n); n != "help" && n != "h" {
				names = append(names, n)
			}
		}
	}
	return names
}

var option = regexp.MustCompile(`--[a-z][a-z0-9-]*`)

func options(help string) map[string]bool {
	found := map[string]bool{"--help": true, "--version": true}
	for _, o := range option.FindAllString(help, -1) {
		found[o] = true
	}
	return found
}

// Options of programs that are not ours, which the pages speak of by themselves.
var foreign = []string{
	"--image-credential-provider-bin-dir", "--image-credential-provider-config", "--image-service-endpoint", // the kubelet's
	"--backend-source", "--mountpoint", // nydusd's that erofsd does not have
	"--local", // of ctr images pull
	"--name",  // any
}

// TestCommands: every command of ours in the pages exists, with its options.
func TestCommands(t *testing.T) {
	known := programs(t)
	if len(known) < 20 {
		t.Fatalf("only these commands were found: %q", slices.Sorted(maps.Keys(known)))
	}
	all := map[string]bool{}
	for _, list := range known {
		maps.Copy(all, list)
	}
	checked := 0
	for page, text := range pages(t) {
		for _, piece := range code(text) {
			if strings.HasPrefix(piece, "--") {
				if o := option.FindString(piece); !all[o] && !slices.Contains(foreign, o) {
					t.Errorf("%s speaks of %s, which is no option", page, o)
				}
				checked++
				continue
			}
			for command := range strings.SplitSeq(strings.NewReplacer("&&", "\n", "|", "\n", ";", "\n").Replace(piece), "\n") {
				ok, err := checkCommand(known, strings.Fields(command))
				if err != nil {
					t.Errorf("%s: %s: %v", page, piece, err)
				}
				if ok {
					checked++
				}
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d commands and options were found", checked)
	}
}

// checkCommand reports whether words are a command of ours, and what is wrong with it.
func checkCommand(known map[string]map[string]bool, words []string) (ours bool, err error) {
	for len(words) > 0 && strings.Contains(words[0], "=") { // variables before it
		words = words[1:]
	}
	if len(words) == 0 {
		return false, nil
	}
	name := filepath.Base(words[0])
	if known[name] == nil || strings.HasPrefix(words[0], "cmd/") {
		return false, nil
	}
	has := maps.Clone(known[name])
	for _, word := range words[1:] {
		if o := option.FindString(word); o != "" && strings.HasPrefix(word, "--") {
			if !has[o] && !(name == "nydusd" && slices.Contains(foreign, o)) { // that may be the other program of the name
				return true, fmt.Errorf("%s has no option %s", name, o)
			}
			continue
		}
		if list := known[name+" "+word]; list != nil {
			name += " " + word
			maps.Copy(has, list)
		} else if name == "erofsctl" && regexp.MustCompile(`^[a-z]+$`).MatchString(word) {
			return true, fmt.Errorf("erofsctl has no command %s", word)
		}
	}
	return true, nil
}

// keys are those of a configuration as shipped, with those that are commented out.
func keys(t *testing.T, file string) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(testenv.ModuleRoot(t), "configs", file))
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := toml.Unmarshal(regexp.MustCompile(`(?m)^#(\S)`).ReplaceAll(text, []byte("$1")), &tree); err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	var walk func(at string, m map[string]any)
	walk = func(at string, m map[string]any) {
		for k, v := range m {
			found[at+k] = true
			if below, ok := v.(map[string]any); ok {
				walk(at+k+".", below)
			}
		}
	}
	walk("", tree)
	return found
}

// TestKeys: every key of a configuration of ours in the pages exists.
func TestKeys(t *testing.T) {
	known := keys(t, "erofsd.toml")
	maps.Copy(known, keys(t, "containerd-erofsd.toml"))
	key := regexp.MustCompile(`^([a-z_]+)(\.[a-z_]+)+\b`)
	checked := 0
	for page, text := range pages(t) {
		if page == "docs/nydusd.md" || page == "docs/design.md" { // nydus's keys; names of Go
			continue
		}
		text, _, _ = strings.Cut(text, "\n## In nydus-snapshotter's place\n")
		for _, piece := range code(text) {
			k := key.FindString(piece)
			table, _, _ := strings.Cut(k, ".")
			if k == "" || !known[table] || strings.HasPrefix(piece[len(k):], "/") {
				continue
			}
			checked++
			if !known[k] && k != "metrics.go" && k != "image.boot" && k != "containerd.service" {
				t.Errorf("%s speaks of the key %s, which there is not", page, k)
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d keys were found", checked)
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)#:]*)(#[^)]*)?\)`)
	config  = regexp.MustCompile(`\bconfigs/[A-Za-z0-9._/-]*[A-Za-z0-9]`)
	letters = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// TestLinks: what the pages link to, and the files of configs that they name, exist.
func TestLinks(t *testing.T) {
	root := testenv.ModuleRoot(t)
	checked := 0
	for page, text := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			checked++
			target := page
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(page), m[1])
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
				continue
			}
			if m[2] != "" && !slices.Contains(anchors(t, filepath.Join(root, target)), m[2]) {
				t.Errorf("%s links to %s%s, which has no such heading", page, m[1], m[2])
			}
		}
		for _, name := range config.FindAllString(text, -1) {
			checked++
			if _, err := os.Stat(filepath.Join(root, name)); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
	}
	if checked < 60 {
		t.Errorf("only %d links were found", checked)
	}
}

// anchors are those of a page's headings.
func anchors(t *testing.T, name string) (found []string) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			heading := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "#")))
			found = append(found, "#"+strings.ReplaceAll(letters.ReplaceAllString(heading, ""), " ", "-"))
		}
	}
	return found
}
