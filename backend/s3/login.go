//go:build !nos3

package s3

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
)

// loginTimeout bounds looking for a login, which may ask several services.
const loginTimeout = 20 * time.Second

// newLogin returns what gives the login that o asks for. When it has to be looked for,
// that is a *found.
func newLogin(o Options) (aws.CredentialsProvider, error) {
	switch {
	case (o.AccessKeyID == "") != (o.AccessKeySecret == ""):
		return nil, errors.New("access key id and access key secret go together, and one of them is missing")
	case o.AccessKeyID == "" && o.SessionToken != "":
		return nil, errors.New("there is a session token without access key id and secret")
	case o.Anonymous && o.AccessKeyID != "":
		return nil, errors.New("there are access keys for an anonymous read")
	case o.Anonymous:
		return aws.AnonymousCredentials{}, nil
	case o.AccessKeyID != "":
		return credentials.NewStaticCredentialsProvider(o.AccessKeyID, o.AccessKeySecret, o.SessionToken), nil
	}
	// Renewed before it ends: else all reads would wait for the new one.
	early := func(c *aws.CredentialsCacheOptions) { c.ExpiryWindow = time.Minute }
	return &found{CredentialsCache: aws.NewCredentialsCache(chain{o.Region}, early)}, nil
}

// found is a login that was looked for. Readers that need it at the same time share one
// look, also when the server refuses what was found before.
type found struct {
	*aws.CredentialsCache

	// mu guards dropped.
	mu      sync.Mutex
	dropped int // how many logins were refused
}

// version names the login that is in use now.
func (f *found) version() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dropped
}

// drop makes the next reader look for another login, unless one has done so since v
// was the version in use.
func (f *found) drop(v int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v == f.dropped {
		f.Invalidate()
		f.dropped++
	}
}

// chain looks for a login where AWS's tools do, every time anew: files may have changed.
type chain struct{ region string }

// Retrieve looks for a login.
func (c chain) Retrieve(ctx context.Context) (aws.Credentials, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	conf, err := config.LoadDefaultConfig(ctx, config.WithRegion(c.region))
	if err == nil {
		var login aws.Credentials
		if login, err = conf.Credentials.Retrieve(ctx); err == nil {
			return login, nil
		}
	}
	return aws.Credentials{}, fmt.Errorf("find a login for S3 as AWS's tools do: %w (%w)", err, fs.ErrPermission)
}
