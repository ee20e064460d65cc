package keychain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"
)

// maxAnswer bounds what a plugin prints, in bytes.
const maxAnswer = 1 << 20

// pipeTime is how long a killed plugin's output may be kept open by its children.
const pipeTime = time.Second

// A response is a plugin's CredentialProviderResponse.
type response struct {
	kind string         // of cacheKey
	keep *time.Duration // nil: it does not say
	ring keyring
}

// run runs the plugin. Its errors have nothing that it printed, which may be a secret.
func (p plugin) run(ctx context.Context, image string) (response, error) {
	request, err := json.Marshal(map[string]string{"apiVersion": p.apiVersion, "kind": "CredentialProviderRequest", "image": image})
	if err != nil {
		return response{}, err
	}
	out := limited{room: maxAnswer}
	cmd := exec.CommandContext(ctx, p.file, p.args...)
	cmd.Stdin, cmd.Stdout = bytes.NewReader(request), &out
	cmd.Env = append(os.Environ(), p.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // its children too
	cmd.WaitDelay = pipeTime
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		return response{}, fmt.Errorf("run %s: it took too long and was killed: %w", p.file, ctx.Err())
	case out.over:
		return response{}, fmt.Errorf("run %s: it prints more than %d bytes", p.file, maxAnswer)
	case err != nil:
		return response{}, fmt.Errorf("run %s: %w", p.file, err)
	}
	r, err := parseResponse(out.p.Bytes(), p.apiVersion)
	if err != nil {
		return response{}, fmt.Errorf("run %s: %w", p.file, err)
	}
	return r, nil
}

// parseResponse reads what a plugin printed. Its errors have nothing of it.
func parseResponse(p []byte, apiVersion string) (response, error) {
	var said struct {
		Kind          string                `json:"kind"`
		APIVersion    string                `json:"apiVersion"`
		CacheKeyType  string                `json:"cacheKeyType"`
		CacheDuration *string               `json:"cacheDuration"`
		Auth          map[string]dockerAuth `json:"auth"`
	}
	if json.Unmarshal(p, &said) != nil || said.Kind != "CredentialProviderResponse" || said.APIVersion != apiVersion {
		return response{}, fmt.Errorf("it prints no CredentialProviderResponse of %s", apiVersion)
	}
	r := response{kind: said.CacheKeyType}
	if !slices.Contains([]string{perImage, perRegistry, perAll}, r.kind) {
		return response{}, errors.New("its cacheKeyType is none of Image, Registry, Global")
	}
	if said.CacheDuration != nil {
		d, err := time.ParseDuration(*said.CacheDuration)
		if err != nil {
			return response{}, errors.New("its cacheDuration is no duration")
		}
		r.keep = &d
	}
	if len(said.Auth) > maxKeys {
		return response{}, errKeys
	}
	for text, a := range said.Auth {
		pattern, err := ParsePattern(text)
		if err != nil {
			return response{}, errors.New("auth has a key that is no pattern of images")
		}
		if login := (Login{Username: a.Username, Password: a.Password}); !login.Empty() {
			r.ring = append(r.ring, key{pattern, login})
		}
	}
	r.ring = r.ring.sorted()
	return r, nil
}

// limited keeps what is written up to a size, and fails then.
type limited struct {
	p    bytes.Buffer
	room int
	over bool
}

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.room-l.p.Len() {
		l.over = true
		return 0, errors.New("too much")
	}
	return l.p.Write(p)
}
