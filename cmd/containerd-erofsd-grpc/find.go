package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// A finder asks containerd by which references its images were pulled. Nothing is asked
// unless an image came without its reference in the labels.
type finder struct {
	conn *grpc.ClientConn
}

// newFinder returns one; it connects at the first question.
func newFinder(address string) (*finder, error) {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	return &finder{conn}, nil
}

func (f *finder) close() { f.conn.Close() }

// find returns the name of an image whose layers have the chain id; "": there is none.
func (f *finder) find(ctx context.Context, chainID string) (string, error) {
	list, err := namespacesapi.NewNamespacesClient(f.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return "", fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, n := range list.Namespaces {
		ctx := namespaces.WithNamespace(ctx, n.Name)
		images, err := imagesapi.NewImagesClient(f.conn).List(ctx, &imagesapi.ListImagesRequest{})
		if err != nil {
			errs = append(errs, fmt.Errorf("list images of namespace %s: %w", n.Name, err))
			continue
		}
		for _, i := range images.Images {
			// Of an index only what was pulled is there; what is not there is no error.
			found, err := f.has(ctx, i.Target.Digest, chainID, maxDepth)
			if found {
				return i.Name, nil
			}
			errs = append(errs, err)
		}
	}
	return "", errors.Join(errs...)
}

const (
	maxDepth    = 3        // of indexes in indexes
	maxDocument = 16 << 20 // bytes of an index, a manifest or a configuration
)

// has reports whether a manifest, or one in an index, has layers with the chain id.
func (f *finder) has(ctx context.Context, d, chainID string, depth int) (bool, error) {
	var doc struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    ocispec.Descriptor   `json:"config"`
	}
	if ok, err := f.read(ctx, d, &doc); !ok || depth == 0 {
		return false, err
	}
	var errs []error
	for _, m := range doc.Manifests {
		found, err := f.has(ctx, m.Digest.String(), chainID, depth-1)
		if found {
			return true, nil
		}
		errs = append(errs, err)
	}
	if doc.Config.Digest == "" {
		return false, errors.Join(errs...)
	}
	var image ocispec.Image
	if ok, err := f.read(ctx, doc.Config.Digest.String(), &image); !ok {
		return false, errors.Join(append(errs, err)...)
	}
	for _, id := range identity.ChainIDs(append([]digest.Digest{}, image.RootFS.DiffIDs...)) {
		if id.String() == chainID {
			return true, nil
		}
	}
	return false, errors.Join(errs...)
}

// read decodes content; ok is false when it is not there.
func (f *finder) read(ctx context.Context, d string, into any) (ok bool, err error) {
	client := contentapi.NewContentClient(f.conn)
	info, err := client.Info(ctx, &contentapi.InfoRequest{Digest: d})
	if err != nil || info.Info.Size > maxDocument {
		return false, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Read(ctx, &contentapi.ReadContentRequest{Digest: d})
	if err != nil {
		return false, fmt.Errorf("read %s: %w", d, err)
	}
	var text []byte
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return false, fmt.Errorf("read %s: %w", d, err)
		}
		text = append(text, part.Data...)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return false, fmt.Errorf("read %s: %w", d, err)
	}
	return true, nil
}
