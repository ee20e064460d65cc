package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// What a daemon that believes everything has in place of the product's comparison. It
// is built for this measurement only, from a copy that exists in the scratch directory.
const (
	verifyFile = "internal/chunk/table.go"
	verified   = "if got := t.entry.Digester.Sum(p); got != t.digests[i] {"
	believed   = "if got := t.digests[i]; got != t.digests[i] {"
)

// verification measures what the digests cost: cold reads of everything by the daemon and
// by one that does not compute them, in turns.
func verification(ctx context.Context, b *bench) error {
	credulous, err := b.buildCredulous(ctx)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name  string
		image api.MountRequest
	}{
		{"cold read, verified, blobs local", b.localImage()},
		{"cold read, verified, registry", b.remoteImage(b.registry.Addr())},
	} {
		var with, without []float64
		for range 2 * b.repeat { // the difference is small beside what a run differs from another
			for bin, times := range map[string]*[]float64{b.bin: &with, credulous: &without} {
				err := b.lazilyBy(ctx, bin, c.image, nil, func(_ *harness.Daemon, dir string) error {
					_, err := readAll(ctx, dir, times)
					return err
				})
				if err != nil {
					return err
				}
			}
		}
		b.add(row{
			Name: c.name, Value: median(with), Unit: "s", Limit: 1.1, LimitOn: "ratio",
			Reference: median(without), ReferenceIs: "the same daemon without computing digests",
		})
	}
	return nil
}

// buildCredulous builds the daemon that does not compute digests, and returns its directory.
func (b *bench) buildCredulous(ctx context.Context) (string, error) {
	dir, err := b.dir()
	if err != nil {
		return "", err
	}
	source, err := os.ReadFile(verifyFile)
	if err != nil {
		return "", err
	}
	if bytes.Count(source, []byte(verified)) != 1 {
		return "", fmt.Errorf("%s does not compare digests as this benchmark knows it: adapt kernel-tests/bench/verify.go", verifyFile)
	}
	original, err := filepath.Abs(verifyFile)
	if err != nil {
		return "", err
	}
	changed, overlay := filepath.Join(dir, "table.go"), filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]map[string]string{"Replace": {original: changed}})
	if err != nil {
		return "", err
	}
	err = errors.Join(
		os.WriteFile(changed, bytes.Replace(source, []byte(verified), []byte(believed), 1), 0o644),
		os.WriteFile(overlay, text, 0o644),
	)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-overlay", overlay, "-o", dir+"/", "./cmd/erofsd", "./cmd/erofsctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build a daemon without digests: %w: %s", err, bytes.TrimSpace(out))
	}
	return dir, nil
}
