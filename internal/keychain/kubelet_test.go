package keychain

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// plugins writes a configuration and programs, of which each counts in NAME.runs how often
// it was run.
func plugins(t *testing.T, config string, scripts map[string]string) (*Kubelet, string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		text := fmt.Sprintf("#!/bin/sh\necho x >> %s/%s.runs\n%s\n", dir, name, script)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := NewKubelet(file, dir)
	if err != nil {
		t.Fatal(err)
	}
	return k, dir
}

func runs(t *testing.T, dir, name string) int {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(dir, name+".runs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(p), "x")
}

const kubeletHead = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"

// provider is an entry of the configuration.
func provider(name, images, keep string, more ...string) string {
	return fmt.Sprintf("- name: %s\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: [%s]\n  defaultCacheDuration: %s\n%s",
		name, images, keep, strings.Join(more, ""))
}

// says prints a response.
func says(kind, keep, auth string) string {
	if keep != "" {
		keep = fmt.Sprintf(`"cacheDuration": %q, `, keep)
	}
	return fmt.Sprintf(`echo '{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": %q, %s"auth": %s}'`, kind, keep, auth)
}

func TestPlugins(t *testing.T) {
	k, dir := plugins(t, kubeletHead+
		provider("a", `"*.example", "*.example:5000"`, "1h", "  args: [get, one]\n  env: [{name: WHO, value: anna}]\n")+
		provider("b", `"r.example/team"`, "1h")+provider("quiet", "quiet.org", "1h")+provider("odd", "odd.org", "1h"),
		map[string]string{
			"a": `[ "$1 $2 $WHO" = "get one anna" ] || exit 3
read request
case $request in *'"image":"r.example'*'"kind":"CredentialProviderRequest"'*) ;; *) exit 4;; esac
` + says("Image", "", `{"*.example": {"username": "anna", "password": "`+secretText+`"}, "*.example:5000": {"username": "port", "password": "p"}}`),
			"b":     says("Image", "", `{"r.example/team": {"username": "team", "password": "t"}}`),
			"quiet": says("Image", "", `{}`),
			"odd":   says("Image", "", `{"elsewhere.org": {"username": "x", "password": "y"}}`),
		})
	for image, want := range map[string]string{
		"r.example/app:1": "anna", "r.example/team/app:1": "team", "r.example:5000/app@sha256:" + strings.Repeat("0", 64): "port",
		"nobody.org/app:1": "", "quiet.org/app": "", "odd.org/app": "",
	} {
		l, err := k.Login(t.Context(), image)
		if err != nil || l.Username != want || want != "" && time.Until(l.Until) < time.Minute {
			t.Errorf("%s: user %q until %v, error %v; want %q", image, l.Username, l.Until, err, want)
		}
	}
	if n := runs(t, dir, "quiet"); n != 1 {
		t.Errorf("a plugin was run %d times", n)
	}
	if _, err := k.Login(t.Context(), "s.example/app"); err == nil || !strings.Contains(err.Error(), "credential provider a") || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("a plugin that fails: %v", err)
	}
}

// TestPluginCache counts runs.
func TestPluginCache(t *testing.T) {
	auth := `{"*.example": {"username": "anna", "password": "1"}}`
	for name, c := range map[string]struct {
		kind, keep string
		images     string
		runs       int
	}{
		"image":         {"Image", "", "r.example/a:1 r.example/a:2 r.example/a@sha256:00", 1},
		"images":        {"Image", "", "r.example/a r.example/b r.example/a", 2},
		"registry":      {"Registry", "", "r.example/a r.example/b:1 s.example/a", 2},
		"all":           {"Global", "", "r.example/a s.example/b", 1},
		"not at all":    {"Global", "0s", "r.example/a r.example/a", 2},
		"for a moment":  {"Global", "1ns", "r.example/a r.example/a r.example/a", 3},
		"negative":      {"Global", "-1s", "r.example/a r.example/a", 2},
		"said, not not": {"Global", "30m", "r.example/a r.example/a", 1},
	} {
		k, dir := plugins(t, kubeletHead+provider("p", `"*.example"`, "1h"), map[string]string{"p": says(c.kind, c.keep, auth)})
		for _, image := range strings.Fields(c.images) {
			if l, err := k.Login(t.Context(), image); err != nil || l.Username != "anna" {
				t.Errorf("%s: %s: %q, %v", name, image, l.Username, err)
			}
		}
		if n := runs(t, dir, "p"); n != c.runs {
			t.Errorf("%s: %d runs, want %d", name, n, c.runs)
		}
		k.Refused("r.example/a:7")
		if _, err := k.Login(t.Context(), "r.example/a"); err != nil || runs(t, dir, "p") != c.runs+1 {
			t.Errorf("%s: after a refusal %d runs, %v", name, runs(t, dir, "p"), err)
		}
	}
	k, _ := plugins(t, kubeletHead+provider("p", `"*.example"`, "1h"), nil)
	for i := range 2 * maxCached {
		k.keep(k.plugins[0], fmt.Sprintf("r.example/a%d", i), response{kind: perImage})
	}
	if len(k.cached) > maxCached {
		t.Errorf("%d answers are kept", len(k.cached))
	}
}

// TestPluginFlight: who asks the same at the same time shares a run, also with one who leaves.
func TestPluginFlight(t *testing.T) {
	gate := filepath.Join(t.TempDir(), "gate")
	k, dir := plugins(t, kubeletHead+provider("p", `"*.example"`, "0s"), map[string]string{
		"p": "while [ ! -e " + gate + " ]; do sleep 0.01; done\n" + says("Image", "", `{"*.example": {"username": "anna", "password": "1"}}`),
	})
	left, leave := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := k.Login(left, "r.example/a")
		gone <- err
	}()
	for runs(t, dir, "p") == 0 {
		time.Sleep(time.Millisecond)
	}
	leave()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves gets %v", err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if l, err := k.Login(t.Context(), "r.example/a"); err != nil || l.Username != "anna" {
				t.Errorf("%q, %v", l.Username, err)
			}
		})
	}
	time.Sleep(10 * time.Millisecond) // more of them are there then; any number is right
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all.Wait()
	if n := runs(t, dir, "p"); n > 8 || n < 1 {
		t.Errorf("%d runs", n)
	}
}

// TestBadPlugins: an error for each, soon, and without what the plugin printed.
func TestBadPlugins(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"fails":        {"echo " + secretText + "; echo " + secretText + " >&2; exit 1", "exit status 1"},
		"no json":      {"echo " + secretText, "prints no CredentialProviderResponse"},
		"other kind":   {`echo '{"kind": "` + secretText + `"}'`, "prints no CredentialProviderResponse"},
		"no cache key": {says("hunter2", "", "{}"), "cacheKeyType"},
		"bad duration": {says("Image", "hunter2", "{}"), "cacheDuration"},
		"bad pattern":  {says("Image", "", `{"hunter2 ": {"username": "a", "password": "b"}}`), "pattern"},
		"too much":     {"yes " + secretText, "prints more than"},
		"hangs":        {"sleep 1000 & echo $! > $0.child; echo x > $0.child.runs; wait", "too long"},
		"missing":      {"", "no such file"},
	} {
		k, dir := plugins(t, kubeletHead+provider("p", `"*.example"`, "1h"), map[string]string{"p": c.script})
		if name == "missing" {
			if err := os.Remove(filepath.Join(dir, "p")); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := t.Context(), context.CancelFunc(func() {})
		if c.want == "too long" {
			ctx, cancel = context.WithCancel(ctx)
			go func() {
				for runs(t, dir, "p.child") == 0 && ctx.Err() == nil {
					time.Sleep(time.Millisecond)
				}
				cancel()
			}()
		}
		_, err := k.plugins[0].run(ctx, "r.example/a")
		cancel()
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if c.want == "too long" {
			ended(t, filepath.Join(dir, "p.child"))
		}
	}
}

// ended waits for the end of the process whose number is in a file.
func ended(t *testing.T, name string) {
	t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(p)))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the plugin's child goes on")
		}
	}
}

// TestBadConfig: everything that is wrong is said.
func TestBadConfig(t *testing.T) {
	good := kubeletHead + provider("p", "r.example", "1h")
	for name, c := range map[string]struct{ text, want string }{
		"no yaml":     {"{", "yaml"},
		"other kind":  {strings.Replace(good, "kind: Cred", "kind: X", 1), "kind:"},
		"version":     {strings.Replace(good, "k8s.io/v1", "k8s.io/v7", 1), "apiVersion:"},
		"unknown key": {good + "  surprise: 1\n", "surprise"},
		"no provider": {strings.Split(good, "- name")[0], "providers:"},
		"path":        {strings.Replace(good, "name: p", "name: ../p", 1), "no file in the plugins' directory"},
		"no images":   {strings.Replace(good, "[r.example]", "[]", 1), "matchImages"},
		"bad image":   {strings.Replace(good, "[r.example]", `["https://x"]`, 1), "https://x"},
		"duration":    {strings.Replace(good, "1h", "soon", 1), "defaultCacheDuration"},
		"twice":       {good + provider("p", "r.example", "1h"), "two of this name"},
		"account":     {good + "  tokenAttributes: {serviceAccountTokenAudience: x}\n", "tokenAttributes"},
		"plugin's":    {strings.Replace(good, "credentialprovider.kubelet.k8s.io/v1", "v1", 1), "credentialprovider.kubelet.k8s.io"},
	} {
		file := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := NewKubelet(file, "/plugins"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
