package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// check runs a container of an image to its end.
func (n *node) check(ctx context.Context, t *testing.T, image client.Image, id string) {
	t.Helper()
	n.prints(ctx, t, image, id, n.w.want)
}

// prints runs check with arguments in a container, to its end, and compares what it prints.
func (n *node) prints(ctx context.Context, t *testing.T, image client.Image, id, want string, args ...string) {
	t.Helper()
	c, err := n.runArgs(ctx, image, id, args...)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.finish(ctx); err != nil || got != want {
		t.Errorf("container %s printed %q, %v; want %q", id, got, err, want)
	}
}

// waiting starts a container that reads when it is told to, and waits until it runs.
func (n *node) waiting(ctx context.Context, t *testing.T, image client.Image, id string) *container {
	t.Helper()
	c, err := n.run(ctx, image, id, true)
	if err != nil {
		t.Fatal(err)
	}
	<-c.output.lines
	return c
}

// finished lets it read, and compares.
func (n *node) finished(ctx context.Context, t *testing.T, c *container) {
	t.Helper()
	if got, err := c.finish(ctx); err != nil || got != "waits\n"+n.w.want {
		t.Errorf("container %s printed %q, %v", c.ID(), got, err)
	}
}

// exec executes something in a container that runs, and returns what it printed.
func (c *container) exec(ctx context.Context, id string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	out := newOutput()
	p, err := c.task.Exec(ctx, id, &specs.Process{Args: args, Cwd: "/"}, cio.NewCreator(cio.WithStreams(new(bytes.Buffer), out, out), cio.WithFIFODir(c.fifos)))
	if err != nil {
		return "", err
	}
	exit, err := p.Wait(ctx)
	if err == nil {
		err = p.Start(ctx)
	}
	if err == nil {
		select {
		case s := <-exit:
			err = allRead(ctx, p)
			if s.ExitCode() != 0 || s.Error() != nil {
				err = fmt.Errorf("%q ended with %d: %w", args, s.ExitCode(), s.Error())
			}
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	_, derr := p.Delete(ctx, client.WithProcessKill)
	return out.String(), errors.Join(err, derr)
}

// manifest is that of an image.
func (n *node) manifest(ctx context.Context, t *testing.T, image client.Image) ocispec.Manifest {
	t.Helper()
	m, err := images.Manifest(ctx, n.ContentStore(), image.Target(), image.Platform())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// dataLayers are the layers of a lazy image with data.
func (n *node) dataLayers(ctx context.Context, t *testing.T, image client.Image) (data []ocispec.Descriptor) {
	t.Helper()
	for _, l := range n.manifest(ctx, t, image).Layers {
		if l.Annotations["containerd.io/snapshot/nydus-blob"] == "true" {
			data = append(data, l)
		}
	}
	if len(data) == 0 {
		t.Fatalf("%s has no layers with data", image.Name())
	}
	return data
}

// dataPulled reports whether containerd has a layer of the image with data.
func (n *node) dataPulled(ctx context.Context, t *testing.T, image client.Image) bool {
	t.Helper()
	for _, l := range n.dataLayers(ctx, t, image) {
		if _, err := n.ContentStore().Info(ctx, l.Digest); err == nil {
			return true
		}
	}
	return false
}

// chain is the name of an image's uppermost layer among containerd's snapshots.
func (n *node) chain(ctx context.Context, t *testing.T, image client.Image) string {
	t.Helper()
	diffs, err := image.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return identity.ChainID(diffs).String()
}

// same compares the files of two directories.
func same(t *testing.T, want, got string) {
	t.Helper()
	files, err := os.ReadDir(want)
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files in %s, %v", len(files), want, err)
	}
	for _, f := range files {
		a, err := os.ReadFile(filepath.Join(want, f.Name()))
		b, berr := os.ReadFile(filepath.Join(got, f.Name()))
		if err := errors.Join(err, berr); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s is not the file of the image: %v", filepath.Join(got, f.Name()), err)
		}
	}
}
